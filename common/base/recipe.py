"""Recipes: frozen dataclasses whose every field carries its default, its source and the stage it belongs to.

`--recipe NAME --set field=value` on the command line, JSON in the run folder. Source tags as in the README: P the
published paper, C the official CutMix code, A an author's answer, B the base code the paper names, X other public code,
I inferred (nothing public fixes it), M measured by us for the small embedded world.
"""

import argparse
import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from backbench.common.base.arguments import Parser, whole
from backbench.common.base.errors import UserError

STAGES = ("train", "predict", "score")
EVAL_PRECISIONS = ("fp32", "bf16", "fp16")
R = TypeVar("R", bound="Fields")


def knob(
    default: Any,
    help: str,
    source: str,
    stage: str = "train",
    choices: tuple[str, ...] = (),
    low: float | None = None,
) -> Any:
    """A recipe field: default, meaning (with unit), source of the value, the stage whose key holds it, lowest value."""
    meta = {"help": help, "source": source, "stage": stage, "choices": choices, "low": low}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What every recipe is: fields made by `knob`."""

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """The fields that belong to one stage's key, JSON-able."""
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["stage"] == stage
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def check(self) -> None:
        """Refuse values that no field takes: not of its choices, not finite, too low. Raises UserError naming it."""
        for field in dataclasses.fields(self):
            choices, low, value = field.metadata["choices"], field.metadata["low"], getattr(self, field.name)
            if choices and value not in choices:
                raise UserError(f"recipe: {field.name}={value}, choose one of {', '.join(choices)}")
            numbers = [
                v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, int | float)
            ]
            if not all(map(math.isfinite, numbers)):
                raise UserError(f"recipe: {field.name}={_show(value)}, it must be finite")
            if low is not None and any(v < low for v in numbers):
                raise UserError(f"recipe: {field.name}={_show(value)}, it must be {low:g} or more")


@dataclass(frozen=True, kw_only=True)
class Recipe(Fields):
    """What every training has. Tasks extend it; a recipe is one instance."""

    epochs: float = knob(
        0.0, "length of training in passes over the data; 0: `iterations` counts", "P", low=0
    )
    iterations: int = knob(0, "length of training in optimiser steps; 0: `epochs` counts", "P", low=0)
    batch: int = knob(256, "images an optimiser step, over all processes", "P")
    micro_batch: int = knob(
        0, "images that share batch-norm and mixing statistics; 0: the whole batch", "C", low=0
    )
    optimizer: str = knob("sgd", "optimiser", "C", choices=("sgd", "adam", "adamw"))
    lr: float = knob(0.1, "peak learning rate", "P")
    momentum: float = knob(0.9, "SGD momentum", "P", low=0)
    nesterov: bool = knob(False, "Nesterov momentum", "C")
    weight_decay: float = knob(1e-4, "weight decay", "P", low=0)
    schedule: str = knob("step", "learning-rate curve", "P", choices=("step", "one_cycle", "constant"))
    milestones: tuple[float, ...] = knob(
        (), "where `step` divides the rate: epochs or iterations, as the length", "P", low=0
    )
    gamma: float = knob(0.1, "factor at each milestone", "P", low=0)
    warmup: int = knob(0, "iterations of linear warm-up from a thousandth of the rate", "P", low=0)
    clip_grad: float = knob(0.0, "largest gradient norm; 0: not clipped", "I", low=0)
    precision: str = knob(
        "auto",
        "arithmetic of training's forward passes; auto: bf16 on hardware that has it, else fp32",
        "I",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    eval_precision: str = knob(
        "fp32",
        "arithmetic of evaluation, prediction and encoding",
        "I",
        stage="predict",
        choices=EVAL_PRECISIONS,
    )
    channels_last: bool = knob(True, "NHWC memory format: the same numbers, faster convolutions", "I")
    save_every: float = knob(60.0, "seconds between checkpoints of a running training", "I", stage="", low=0)
    log_every: int = knob(20, "iterations between log lines", "I", stage="", low=1)

    def stage_fields(self, stage: str) -> dict[str, Any]:
        """The fields of a stage's key, without `eval_precision` where it is fp32."""
        fields = super().stage_fields(stage)
        return {k: v for k, v in fields.items() if (k, v) != ("eval_precision", "fp32")}

    def length(self, images: int) -> int:
        """Training length in iterations, for a data set of `images` images."""
        return self.iterations or max(1, round(self.epochs * images / self.batch))

    def milestone_iterations(self, images: int) -> list[int]:
        """`milestones` in iterations."""
        return [int(m) if self.iterations else round(m * images / self.batch) for m in self.milestones]

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        if (self.epochs > 0) == (self.iterations > 0):
            raise UserError(
                "recipe: give either epochs or iterations, the other 0 (e.g. --set epochs=0 --set iterations=100)"
            )
        if self.batch < 1:
            raise UserError(f"recipe: batch={self.batch}, at least 1 image is needed")
        if self.micro_batch and self.batch % self.micro_batch:
            raise UserError(f"recipe: batch={self.batch} is no multiple of micro_batch={self.micro_batch}")
        if not self.lr > 0:
            raise UserError(f"recipe: lr={self.lr}, it must be above 0")
        if self.nesterov and not self.momentum and self.optimizer == "sgd":
            raise UserError("recipe: nesterov=true needs momentum: --set nesterov=false, or momentum above 0")


def to_json(recipe: Fields) -> dict[str, Any]:
    """All fields as plain JSON values."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(recipe).items()}


def override(recipe: R, settings: list[str]) -> R:
    """Apply `field=value` settings. Raises UserError for an unknown field (listing all) or an unreadable value."""
    hints = typing.get_type_hints(type(recipe))
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write it as field=value")
        if name not in hints:
            raise UserError(f"--set {setting}: no field {name!r}; the fields are {', '.join(sorted(hints))}")
        try:
            changes[name] = _parse(text, hints[name])
        except ValueError:
            raise UserError(f"--set {setting}: {name} takes {_wanted(hints[name])}") from None
    changed = dataclasses.replace(recipe, **changes)
    changed.check()
    return changed


def _parse(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is tuple:
        parts = [] if text.lower() == "none" else text.replace("+", ",").split(",")
        return tuple(_parse(part, typing.get_args(hint)[0]) for part in parts if part)
    if isinstance(hint, types.UnionType):
        return None if text.lower() == "none" else _parse(text, typing.get_args(hint)[0])
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError
        return text.lower() in ("true", "1")
    return hint(text)


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "numbers like 10,20, or none"
    if isinstance(hint, types.UnionType):
        return f"{_wanted(typing.get_args(hint)[0])}, or none"
    return {bool: "true or false", int: "a whole number", float: "a number"}[hint]


def label(name: str, settings: list[str], recipe: Fields) -> str:
    """A recipe's name in result paths: `paper`, or `paper+lr=0.01` when fields of training were set.

    Fields of later stages are left out: a new threshold scores the same run again, in the same folder.
    """
    train = recipe.stage_fields("train")
    return "+".join([name, *sorted(s for s in settings if s.partition("=")[0] in train)]).replace("/", "_")


def describe(recipes: dict[str, Fields]) -> str:
    """The help text's table: every field, its value in each named recipe, its source and meaning."""
    first = next(iter(recipes.values()))
    lines = [f"recipe fields (--set field=value), their value in {' | '.join(recipes)}, [source], meaning:"]
    for field in dataclasses.fields(first):
        if not field.metadata["help"]:  # not the user's to set
            continue
        values = [_show(getattr(recipe, field.name)) for recipe in recipes.values()]
        shown = values[0] if len(set(values)) == 1 else " | ".join(values)
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(
            f"  {field.name} = {shown}  [{field.metadata['source']}] {field.metadata['help']}{choices}"
        )
    lines.append(
        "sources: P the published paper, C its code, A an author's answer, B the base code it names,"
    )
    lines.append(
        "         X other public code, I inferred: nothing public fixes it, M measured for the small world"
    )
    return "\n".join(lines)


def _show(value: Any) -> str:
    return ",".join(f"{v:g}" for v in value) or "none" if isinstance(value, tuple) else str(value)


def parser(description: str, recipes: dict[str, Recipe], default: str) -> argparse.ArgumentParser:
    """An argument parser with what every training script takes: recipe, seed, output, limits."""
    made = Parser(
        description=description,
        epilog=describe(recipes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--recipe",
        default=default,
        choices=list(recipes),
        help="named recipe: smoke and tiny are for the embedded world, mini for real data on one GPU, paper as "
        f"published (default: {default})",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one recipe field; repeatable",
    )
    made.add_argument(
        "--seed", type=whole(), default=0, help="seed of initial weights, order, augmentation (default: 0)"
    )
    made.add_argument(
        "--limit",
        type=whole(),
        default=0,
        metavar="N",
        help="use only N images of each split; shown on the board",
    )
    made.add_argument(
        "--workers", type=whole(), default=None, help="loader processes (default: chosen by the data)"
    )
    made.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU when there is one)")
    made.add_argument(
        "--compile",
        action="store_true",
        help="compile the network before training: faster, the same numbers to rounding",
    )
    made.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the scalars of log.jsonl for TensorBoard too, to tensorboard/ in the run folder",
    )
    made.add_argument(
        "--skip-bad", action="store_true", help="leave unreadable images out, counted in the cell"
    )
    made.add_argument(
        "--restart", action="store_true", help="throw away what the output folder holds of this run"
    )
    return made


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of the command line of `parser` goes to `engine.train` as it is."""
    return {"workers": args.workers, "compile": args.compile, "tensorboard": args.tensorboard}
