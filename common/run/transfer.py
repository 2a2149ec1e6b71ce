"""What every transfer task does before it trains: arguments, data, backbone and run folder, checked in this order."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backbench.common.backbones.input_check import LARGEST, adoption_report
from backbench.common.backbones.load import Backbone, load_backbone
from backbench.common.base.errors import UserError
from backbench.common.base.files import write_json
from backbench.common.base.recipe import Recipe, label, parser
from backbench.common.data.types import ImageSet
from backbench.common.engine import is_main, pick_device
from backbench.common.run.cell import Run, open_run


@dataclass(frozen=True)
class Transfer:
    """An opened transfer run."""

    run: Run
    backbone: Backbone
    train_set: Any
    test_set: Any
    device: torch.device


def transfer_parser(doc: str, recipes: Mapping[str, Recipe], data_help: str) -> argparse.ArgumentParser:
    """The command line of a transfer task: the recipe's arguments, the backbone's, the data's."""
    made = parser(doc, dict(recipes), default="tiny")
    made.add_argument(
        "--backbone",
        required=True,
        help="a checkpoint (a file of pretrain/run.py, torchvision, timm, the official CutMix code …), "
        "torchvision:NAME, timm:NAME, or scratch:ARCH for random weights",
    )
    reading_arguments(made)
    made.add_argument(
        "--name", help="the backbone's name in results (default: the file's method, or its name)"
    )
    made.add_argument(
        "--group", help="its row on the board: backbones of one group are pretraining seeds of it"
    )
    made.add_argument(
        "--val-share",
        type=float,
        default=0.0,
        metavar="S",
        help="hold this share of the training images out and score those, not the test images; never ranked",
    )
    made.add_argument(
        "--swept",
        metavar="FIELD=A,B,C",
        help="say that this FIELD, given by --set, was chosen among these values on held-out training images",
    )
    made.add_argument("--out", type=Path, default=Path("results"), help="results folder (default: results)")
    help_text = f"{data_help}, or scenes, the embedded world (default)"
    made.add_argument("--data", metavar="KIND:PATH", help=help_text)
    return made


def reading_arguments(made: argparse.ArgumentParser) -> None:
    """Add the arguments that say what of a checkpoint is taken and how its weights read their input; see `reading`."""
    made.add_argument(
        "--arch",
        help="architecture of `--backbone scratch`; for a file: take it for this plain one, whatever it says of itself",
    )
    made.add_argument(
        "--weights",
        metavar="WHICH",
        help="of a file with several networks: ema, raw (no average), student, teacher, query, key, online, target, "
        "momentum, or the prefix of its keys; also FILE#WHICH",
    )
    made.add_argument(
        "--leave-out",
        metavar="MODULE,…",
        help="modules beside the body that follow it and may be left out, though they are no known head",
    )
    made.add_argument(
        "--input-mean",
        metavar="R,G,B",
        help="mean that the weights want taken off RGB/255 (default: as the file says, else ImageNet's)",
    )
    made.add_argument(
        "--input-std", metavar="R,G,B", help="deviation to divide by then (1/255 each for 0 to 255)"
    )
    made.add_argument(
        "--bgr",
        action=argparse.BooleanOptionalAction,
        help="the weights were trained on BGR images (Caffe, OpenCV; default: as the file or its library says)",
    )
    made.add_argument(
        "--stride-in-1x1",
        action=argparse.BooleanOptionalAction,
        help="bottlenecks stride in the 1×1 convolution (Caffe's and jwyang's ResNets), not in the 3×3 (default: "
        "as the file or its library says)",
    )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `load_backbone` and `load_classifier` that `reading_arguments` read."""
    return {
        "arch": args.arch,
        "weights": args.weights,
        "leave_out": tuple(filter(None, (args.leave_out or "").split(","))),
        "mean": _three(args.input_mean, "--input-mean"),
        "std": _three(args.input_std, "--input-std"),
        "bgr": args.bgr,
        "stride_in_1x1": args.stride_in_1x1,
    }


def _three(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(math.isfinite(v) and (option == "--input-mean" or v > 0) for v in values):
        raise UserError(
            f"{option} {text}: three numbers are needed, in shares of 255, e.g. 0.485,0.456,0.406"
        )
    return values


def open_transfer(
    args: argparse.Namespace, *, task: str, model: str, recipe: Recipe, settings: list[str], reader: Callable
) -> Transfer:
    """Read and check the data with `reader` (an `open_*` of common.data), load the backbone, open the run folder.

    `settings` are the `field=value` texts that name the recipe in result paths. What the data's rules did is noted in
    the run, and so is a warning of the adoption report (`adoption.json`). Raises UserError for whatever is wrong,
    before anything is written.
    """
    device = pick_device(args.device)
    train_set, test_set = reader(data_or_world(args), args.limit or None, args.skip_bad)
    if args.val_share:
        train_set, test_set = hold_out(train_set, args.val_share)
    backbone = load_backbone(args.backbone, name=args.name, seed=args.seed, **reading(args))
    backbone.group = args.group or backbone.group
    if args.swept:
        settings = [s for s in settings if s.partition("=")[0] != args.swept.partition("=")[0]]
    run = open_run(
        args.out,
        task=task,
        data=test_set.name,
        model=model,
        recipe=recipe,
        recipe_label=label(args.recipe, settings, recipe) + swept_label(args.swept),
        backbone=backbone,
        seed=args.seed,
        trained_on=device,
        train_fingerprint=train_set.fingerprint,
        test_fingerprint=test_set.fingerprint,
        limit=args.limit,
        val_share=args.val_share,
        restart=args.restart,
        skip_bad=len(train_set.skipped) + len(test_set.skipped),
    )
    run.note_data(train_set.report, test_set.report)
    if args.swept:
        field, _, values = args.swept.partition("=")
        run.note(
            f"{field} was chosen for each backbone among {values.replace(',', ', ')} on held-out training images: "
            f"{len(values.split(','))} more trainings a backbone"
        )
    if run.finished and is_main():
        print(f"finished already: {run.folder}")
    elif is_main():
        for note in run.notes:
            print(f"note: {note}")
        for line in backbone.report:
            print(f"backbone: {line}")
        if not backbone.scratch:
            _check_adoption(run, backbone, train_set, device)
    return Transfer(run, backbone, train_set, test_set, device)


def swept_label(swept: str | None) -> str:
    """How a sweep is written in a recipe's label, the same for every backbone: `+lr=best_of_0.1_0.01`."""
    if not swept:
        return ""
    field, _, values = swept.partition("=")
    return f"+{field}=best_of_{values.replace(',', '_')}"


def hold_out(images: Any, share: float) -> tuple[Any, Any]:
    """Split `share` of the training images off, by hash of their ids: (trained on, scored).

    Where images have boxes (localisation), the scored ones are a share of those with boxes. Raises UserError when
    nothing is left on one side.
    """
    if not 0 < share < 1:
        raise UserError(f"--val-share {share:g}: it is a share, above 0 and below 1")
    rest, scored = images.split(share, images.boxed if isinstance(images, ImageSet) else None)
    if not len(scored) or not len(rest):
        what = "no training image has a box to score" if isinstance(images, ImageSet) else "too few images"
        raise UserError(
            f"{images.name}: --val-share {share:g} leaves none on one side of {len(images)} ({what})"
        )
    return rest, scored


def _check_adoption(run: Run, backbone: Backbone, train_set: Any, device: torch.device) -> None:
    report = adoption_report(backbone, train_set, device, getattr(run.recipe, "size", LARGEST))
    write_json(run.folder / "adoption.json", report)
    backbone.report.extend(report["verdict"])  # goes into cell.json with it
    for line in report["verdict"]:
        print(f"backbone: {line}")
    for line in report["warnings"]:
        run.note(f"backbone: {line}")
        print(f"warning: {line}")


def data_or_world(args: argparse.Namespace) -> str:
    """The data spec of the command line, or the embedded world, which is said; so is a recipe that is made for it."""
    if args.data:
        if args.recipe == "tiny" and not args.data.startswith("scenes") and is_main():
            print(
                "recipe tiny: sizes and lengths for the embedded world; for other data see --recipe mini, paper"
            )
        return args.data
    spec = "scenes:size=smoke" if args.recipe == "smoke" else "scenes"
    if is_main():
        print(f"no --data: using the embedded world ({spec})")
    return spec
