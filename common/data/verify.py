"""Is a data set on disk what a training needs? Read as training reads it, in seconds: layout, counts, images."""

import os
import time
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.base.progress import progress
from backbench.common.data import published, read_parts
from backbench.common.data.check import image_faults
from backbench.common.data.decode import read_rgb
from backbench.common.data.overlap import find_copies
from backbench.common.data.published import Findings, Parts, counted
from backbench.common.data.registry import DataSpec, parse_data
from backbench.common.data.types import DetectionSet

SAMPLE = 64
BLOCK = 4096  # images given to the threads at a time
COMMANDS = {
    "classification": "pretrain/run.py",
    "localisation": "wsol/finetune.py",
    "detection": "detection/finetune.py",
    "captioning": "captioning/finetune.py",
}


@dataclass(frozen=True)
class Kind:
    """How a kind is verified: by the tasks that train on it, and against what is published.

    `parts`: what its training and its scored images are called. `published(spec, parts, findings)` compares;
    `before(spec, findings)` looks at the files before they are read.
    """

    tasks: tuple[str, ...]
    parts: tuple[str, str]
    published: Callable[[DataSpec, Parts, Findings], None]
    before: Callable[[DataSpec, Findings], None] | None = None


BOTH = ("classification", "localisation")
KINDS = {
    "imagenet": Kind(("classification",), ("train", "val"), published.of_imagenet, published.before_imagenet),
    "ilsvrc": Kind(BOTH, ("train", "val"), published.of_ilsvrc),
    "tiny_imagenet": Kind(BOTH, ("train", "val"), published.of_tiny_imagenet),
    "cifar10": Kind(("classification",), ("train", "test"), published.of_cifar, published.before_cifar),
    "cifar100": Kind(("classification",), ("train", "test"), published.of_cifar, published.before_cifar),
    "cub": Kind(BOTH, ("train", "test"), published.of_cub),
    "voc": Kind(("detection",), ("train", "test"), published.of_voc),
    "coco": Kind(("detection",), ("train", "val"), published.of_coco),
    "captions": Kind(("captioning",), ("train", "test"), published.of_captions),
    "folder": Kind(BOTH, ("train", "val"), published.of_folder),
}


def verify(text: str, full: bool = False, sample: int = SAMPLE) -> int:
    """Verify `KIND:PATH`, printing what is found; 0 when it is fine and 1 when there are problems.

    Kinds: imagenet, ilsvrc (its boxes too), tiny_imagenet, cifar10, cifar100, cub, voc, coco, captions, folder. All
    but the last four name one published set, so whatever lacks is a problem; of voc, coco, captions and folder (and of
    ilsvrc's boxes) a difference from the published numbers is said and no problem.
    The data is read as the task's command reads it, and what stops that command is a problem of its name; so is what
    changes a score without stopping it. `sample` images are decoded, with `full` all. Raises UserError for what is no
    data spec.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise UserError(f"{text}: verify takes KIND:PATH, KIND one of {', '.join(KINDS)}")
    spec = parse_data(f"folder:{rest}" if kind == "imagenet" else text)
    findings, start = Findings(), time.monotonic()
    stopped = _verify(KINDS[kind], spec, findings, None if full else sample)
    number = findings.problems
    outcome = counted(number, "problem", "problems") if number else "fine"
    which = f"; {' and '.join(stopped)} would not run" if stopped else ""
    print(f"{text}: {outcome}{which} ({time.monotonic() - start:.1f} s)")
    return 1 if number else 0


def _verify(kind: Kind, spec: DataSpec, findings: Findings, sample: int | None) -> list[str]:
    """Say everything; the commands that would not run."""
    try:
        if kind.before:
            kind.before(spec, findings)
    except UserError as error:
        findings.say("PROBLEM", str(error))
        return [COMMANDS[task] for task in kind.tasks]
    read, errors = {}, {}
    for task in kind.tasks:
        if task != "localisation" or _has_boxes(spec, read):
            try:
                read[task] = dict(zip(kind.parts, read_parts(task, spec)))
            except UserError as error:
                errors.setdefault(str(error), []).append(COMMANDS[task])
    for error, commands in errors.items():
        findings.say("PROBLEM", f"{' and '.join(commands)}: {error}")
    stopped = [command for commands in errors.values() for command in commands]
    if read:
        kind.published(spec, next(iter(read.values())), findings)
    _say_reports(read, findings)
    return stopped + _look_at_images(read, findings, sample)


def _has_boxes(spec: DataSpec, read: dict[str, Parts]) -> bool:
    """Whether localisation is meant: boxes are named, or came with the images."""
    came = any(part.boxes is not None for part in list(read.get("classification", {}).values())[1:])
    return came or "boxes" in spec.options


def _say_reports(read: dict[str, Parts], findings: Findings) -> None:
    """What the readers' rules did, each line once; those that change a score are problems."""
    lines = {}
    for parts in read.values():
        for name, part in parts.items():
            for line in (
                part.report if getattr(part, "pixels", None) is None else ()
            ):  # CIFAR's is of its counts
                lines[f"{name}: {line}"] = "PROBLEM" if line in part.problems else "note"
    for line, state in lines.items():
        findings.say(state, line)


def _look_at_images(read: dict[str, Parts], findings: Findings, sample: int | None) -> list[str]:
    """Check all images and decode `sample` of them as a training does; the commands that an image stops."""
    stopped, faulty, frames, copies = set(), {}, {}, set()
    for task, parts in read.items():
        parts = {name: part for name, part in parts.items() if getattr(part, "pixels", None) is None}
        for part in parts.values():
            try:
                faults = {part.paths[i]: fault for i, fault in image_faults(part.paths)}
            except UserError as error:
                findings.say("PROBLEM", f"{COMMANDS[task]}: {error}")
                return [COMMANDS[task]]
            for path in faults.keys() - faulty.keys():
                findings.say(
                    "PROBLEM", f"{path}: {faults[path]}; repair or remove it, or train with --skip-bad"
                )
            faulty |= faults
            if faults:
                stopped.add(COMMANDS[task])
            few = len(part) if sample is None else min(len(part), max(1, sample // len(parts)))
            for i in np.linspace(0, len(part) - 1, few).round().astype(int):
                frames[part.paths[i]] = part.sizes[i] if isinstance(part, DetectionSet) else None
        if parts and _say_copies(parts, copies, findings) and task == "localisation":
            stopped.add(COMMANDS[task])
    if _decode(frames, faulty.keys(), findings, sample):
        stopped |= {COMMANDS[task] for task in read}
    return sorted(stopped)


def _say_copies(parts: Parts, said: set[tuple[Path, Path]], findings: Findings) -> int:
    """How many images are scored and trained on under two names (under one: see the report); said once."""
    copies = [(one, other) for one, other in find_copies(*parts.values()) if one != other]
    if copies and not said.issuperset(copies):
        one, other = copies[0]
        many = counted(len(copies), "such image", "such images")
        findings.say("PROBLEM", f"{one}: is to be scored and is also the training image {other} ({many})")
    said.update(copies)
    return len(copies)


def _decode(
    frames: dict[Path, np.ndarray | None], faulty: Set[Path], findings: Findings, sample: int | None
) -> int:
    """Decode images, each in the frame of its boxes, but for the `faulty`; how many cannot be."""
    paths, sides = [path for path in frames if path not in faulty], []
    with (
        ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,
        progress(desc="reading images", total=len(paths), unit="img", delay=2) as bar,
    ):
        for start in range(0, len(paths), BLOCK):
            block = paths[start : start + BLOCK]
            for result in pool.map(_sides, block, [frames[path] for path in block]):
                bar.update()
                if isinstance(result, str):
                    findings.say("PROBLEM", result)
                else:
                    sides.append(result)
    which = "every image" if sample is None else "a sample"
    if sides:
        low, high = np.min(sides, axis=0), np.max(sides, axis=0)
        of = counted(len(frames), "image", "images")
        read = f"{len(sides):,} of {of} decoded ({which})"
        state = "ok" if len(sides) == len(frames) else "note"
        findings.say(state, f"{read}, {low[0]} × {low[1]} to {high[0]} × {high[1]}")
    return len(paths) - len(sides)


def _sides(path: Path, frame: np.ndarray | None) -> tuple[int, int] | str:
    try:
        height, width = read_rgb(path, frame).shape[:2]
    except UserError as error:
        return str(error)
    return width, height
