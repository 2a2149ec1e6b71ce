"""Run folders and cells: what a run writes, in which order, and when it counts as finished.

A run goes through three keyed stages, train → predict → score. Each key holds the recipe fields of its stage, the
fingerprints of its inputs and a protocol number raised by hand when the meaning of a stage changes; so a new score
never retrains. `cell.json` is written last and atomically: a folder without it is not finished.
"""

import functools
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock, Timeout

from backbench.common.backbones.load import Backbone
from backbench.common.base.errors import UserError
from backbench.common.base.files import (
    file_digest,
    fitting_name,
    make_folder,
    read_json,
    write_json,
    write_npz,
    write_text,
)
from backbench.common.base.locks import holder, lock
from backbench.common.base.recipe import STAGES, Recipe, to_json
from backbench.common.engine import barrier, from_main, hardware, is_main, peak_memory, resolve_precision
from backbench.common.run.keys import (
    CHECKOUT,
    ROOT,
    code_hash,
    differences,
    evaluated_in,
    stage_inputs,
    stage_keys,
)

SCHEMA = 1
PATIENCE = 5.0  # seconds in which a killed process ends, and with it the hold on its folder
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "mmengine-lite",
    "albumentations",
    "pillow",
    "pycocotools",
    "pycocoevalcap",
)


@dataclass(frozen=True)
class Identity:
    """What a cell is a measurement of; the fields give its place in a results folder."""

    data: str
    task: str
    model: str
    recipe: str
    backbone: str
    seed: int
    group: str = ""
    method: str = ""
    arch: str = ""
    pretrain_seed: int | None = None
    limit: int = 0
    val_share: float = 0.0  # above 0: this share of the training images was held out and scored; never ranked

    @property
    def path(self) -> Path:
        """DATA/TASK/MODEL/RECIPE/BACKBONE/seedK."""
        recipe = self.recipe + (f"+limit={self.limit}" if self.limit else "")
        recipe += f"+val={self.val_share:g}" if self.val_share else ""
        parts = (self.data, self.task, self.model, recipe, self.backbone, f"seed{self.seed}")
        return Path(*map(fitting_name, parts))


@dataclass
class Run:
    """An opened run folder."""

    folder: Path
    identity: Identity
    recipe: Recipe
    keys: dict[str, str]
    facts: dict[str, Any]
    train_precision: str | None = None  # resolved where training began; None: nothing is trained
    lock: BaseFileLock | None = None  # held as long as the run is
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the cell of these very keys is there."""
        cell = self._cell()
        return cell is not None and cell["keys"] == self.keys and self._evaluated_alike(cell)

    @property
    def training(self) -> Recipe:
        """The recipe in the arithmetic in which this run's training began, on whatever machine."""
        return replace(self.recipe, precision=self.train_precision)

    def _cell(self) -> dict[str, Any] | None:
        path = self.folder / "cell.json"
        return read_json(path) if path.exists() else None

    def _evaluated_alike(self, cell: dict[str, Any]) -> bool:
        return evaluated_in(cell) == self.recipe.eval_precision

    def stages(self) -> dict[str, Any]:
        """What stages.json records of the finished stages."""
        path = self.folder / "stages.json"
        return read_json(path) if path.exists() else {}

    def done(self, stage: str) -> bool:
        """Whether a stage's files are there and were made with this run's key."""
        entry = self.stages().get(stage, {})
        if entry.get("key") != self.keys[stage]:
            return False
        if stage == "predict":
            made = entry if "eval_precision" in entry else self._cell()  # where it stood before
            if made is None or not self._evaluated_alike(made):
                return False
        return all((self.folder / name).exists() for name in entry["files"])

    def note(self, line: str) -> None:
        """Add a line to what the board shows beside the score: a deviation, a rule that fired in the data."""
        if line not in self.notes:
            self.notes.append(line)

    def note_data(self, train_report: list[str], test_report: list[str]) -> None:
        """Note what the rules for flawed data did, part by part."""
        for part, lines in (("training", train_report), ("test", test_report)):
            for line in lines:
                self.note(f"{part} data: {line}")

    @contextmanager
    def stage(self, name: str, files: list[str]) -> Iterator[None]:
        """Run a stage's body, which writes `files` into the folder; record key, hashes and cost when it succeeds."""
        (self.folder / "cell.json").unlink(missing_ok=True)
        start = time.monotonic()
        yield
        entry = {
            "key": self.keys[name],
            "files": {file: file_digest(self.folder / file) for file in files},
            "seconds": round(time.monotonic() - start, 2),
        }
        if name == "predict":
            entry["eval_precision"] = self.recipe.eval_precision
        write_json(self.folder / "stages.json", {**self.stages(), name: entry})

    def finish(
        self,
        *,
        metrics: Mapping[str, float | None],
        chance: Mapping[str, float],
        primary: str,
        images: Mapping[str, np.ndarray],
        report: Mapping[str, Any],
        report_md: str,
        device: torch.device,
        cost: Mapping[str, Any],
    ) -> None:
        """Write images.npz, report.json, report.md and, last, cell.json.

        `images` holds "ids" and the per-image statistics from which `common.metrics.rescore` gives `metrics`
        (fractions; None where a score could not be had, with a note that says why). `cost` is what `train` returned.
        """
        write_npz(self.folder / "images.npz", **images)
        write_json(self.folder / "report.json", {**report, "notes": self.notes})
        write_text(self.folder / "report.md", report_md.rstrip() + "\n")
        stages = self.stages()
        names = ["images.npz", "report.json", "report.md", *(f for s in stages.values() for f in s["files"])]
        cell = {
            "schema": SCHEMA,
            "identity": self.identity.__dict__,
            "metrics": dict(metrics),
            "chance": dict(chance),
            "primary": primary,
            "cost": {
                "train_s": cost.get("seconds", 0.0),
                **{f"{name}_s": entry["seconds"] for name, entry in stages.items()},
                "iterations": cost.get("iterations", 0),
                "images": cost.get("images", 0),
                "peak_memory_mb": max(cost.get("peak_memory_mb", 0), peak_memory(device)),
            },
            "keys": self.keys,
            "notes": self.notes,
            "files": {name: file_digest(self.folder / name) for name in sorted(set(names))},
            **self.facts,
            "device": {
                **hardware(device),
                "compiled": cost.get("compiled", False),
                "trained_on_processes": cost.get("processes", [1]),
            },
            "train_precision": self.train_precision,
            "eval_precision": self.recipe.eval_precision,
        }
        write_json(self.folder / "cell.json", cell)


def open_run(
    out: Path | str,
    *,
    task: str,
    data: str,
    model: str,
    recipe: Recipe,
    recipe_label: str,
    backbone: Backbone | None,
    seed: int,
    train_fingerprint: str,
    test_fingerprint: str,
    trained_on: torch.device | None = None,
    limit: int = 0,
    val_share: float = 0.0,
    protocol: Mapping[str, int] | None = None,
    restart: bool = False,
    skip_bad: int = 0,
    identity: Identity | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> Run:
    """Make or open the run folder OUT/DATA/TASK/MODEL/RECIPE/BACKBONE/seedK (OUT itself when `identity` is given).

    `trained_on` is the device that trains, None where nothing is trained: `precision=auto` is resolved for it when a
    run begins, and kept. Writes recipe.json and provenance.json. Raises UserError when the folder cannot be written to,
    or holds a run whose training had other inputs: named, with what to do.
    """
    folder = Path(out).expanduser()
    label = backbone.name if identity is None else identity.backbone
    if "/" in label or label in (".", ".."):
        raise UserError(f"backbone name '{label}': it names a folder of the results, so give one without /")
    if identity is None:
        known = {k: getattr(backbone, k) for k in ("group", "method", "arch", "pretrain_seed")}
        identity = Identity(
            data, task, model, recipe_label, backbone.name, seed, **known, limit=limit, val_share=val_share
        )
        folder = folder / identity.path
    here = resolve_precision(recipe.precision, trained_on) if trained_on else None
    train_precision, in_key = here, None
    if trained_on and recipe.precision == "auto":
        found = None if restart else _began_in(folder, here)
        train_precision, in_key = from_main(found or (here, None if here == "fp32" else here))
    inputs = stage_inputs(
        task=task,
        model=model,
        fields={stage: recipe.stage_fields(stage) for stage in STAGES},
        train_fingerprint=train_fingerprint,
        test_fingerprint=test_fingerprint,
        backbone=backbone.fingerprint if backbone else None,
        seed=seed,
        limit=limit,
        protocol=protocol,
        more=more,
        precision=in_key,
    )
    keys = stage_keys(inputs)
    held = None
    if is_main():
        held = _prepare(folder, keys["train"], inputs["train"], restart)
        began = {"train_precision": train_precision}
        write_json(
            folder / "recipe.json", {"recipe": to_json(recipe), "keys": keys, "inputs": inputs, **began}
        )
        write_json(folder / "provenance.json", {**provenance(task), **_command()})
    barrier()  # or another process would find what --restart is about to remove
    facts: dict[str, Any] = {"inputs": inputs, "skipped_images": skip_bad, "code": code_hash(task)}
    if backbone:
        facts["backbone"] = {
            "source": Path(backbone.source).name,
            "fingerprint": backbone.fingerprint,
            "report": backbone.report,
        }
    run = Run(folder, identity, recipe, keys, facts, train_precision, held)
    if train_precision != here:
        run.note(
            f"precision=auto was {train_precision} where this training began, and stayed so; here it is {here}"
        )
    return run


def _began_in(folder: Path, here: str) -> tuple[str, str | None] | None:
    """What `precision=auto` was in the folder's training, and what of it is in the train key; None where none began.

    A run of before says it in its cell alone; where it has none, it goes on in what it is `here`.
    """
    if not (folder / "recipe.json").exists():
        return None
    old, cell = read_json(folder / "recipe.json"), folder / "cell.json"
    known = old.get("train_precision") or (read_json(cell).get("precision") if cell.exists() else None)
    return known or here, old["inputs"]["train"].get("precision")


def _prepare(folder: Path, key: str, inputs: dict[str, Any], restart: bool) -> BaseFileLock:
    """Make the folder this process's own; it is as long as the lock that this returns is held."""
    make_folder(folder)
    try:
        held = lock(folder / ".lock", PATIENCE)
    except Timeout:
        line = f"{folder}: another process is at work there{holder(folder / '.lock')}"
        raise UserError(f"{line}; wait for it, or choose another --out") from None
    try:
        if restart and (folder / "recipe.json").exists():
            _clear(folder)
        for leftover in folder.glob(".*.tmp"):  # half a file of a killed process
            leftover.unlink()
        if (folder / "recipe.json").exists():
            old = read_json(folder / "recipe.json")
            if old["keys"]["train"] != key:
                changed = "; ".join(differences(old["inputs"]["train"], inputs)[:4])
                raise UserError(
                    f"{folder}: holds a run with {changed}; choose another --out (or --name, for another "
                    "backbone), or --restart to replace it"
                )
    except BaseException:
        held.release()
        raise
    return held


def _clear(folder: Path) -> None:
    """Remove all but the lock and what stands in for it."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.startswith(".lock"):
            path.unlink()


@functools.cache
def provenance(task: str) -> dict[str, Any]:
    """What made a run: git revision and diff, packages, code hash."""
    return {
        "git": _git("rev-parse", "HEAD") or "not a git checkout",
        "git_diff": hashlib.sha256(diff.encode()).hexdigest()[:16]
        if (diff := _git("diff", "HEAD"))
        else "clean",
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code_hash(task),
    }


def _command() -> dict[str, Any]:
    """The task's command line and where it was given; nothing when a run was opened from other code."""
    script = Path(sys.argv[0]).resolve()
    if script.suffix != ".py" or script.parent.parent != ROOT:
        return {}
    return {"command": [f"{script.parent.name}.{script.stem}", *sys.argv[1:]], "folder": str(Path.cwd())}


def _git(*args: str) -> str:
    if not CHECKOUT:  # an installed copy may lie below a repository of something else
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
