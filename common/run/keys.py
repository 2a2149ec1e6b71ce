"""What a cell's three stages are keyed by, and the hash of the code that computes them; imports nothing heavy."""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbench.common.base.files import digest
from backbench.common.base.recipe import STAGES

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = (ROOT / "backbench.py").exists()  # else an installed copy
# 1 where a task names none; 2: COCO's AP beside VOC's; 3: chance by other images' detections,
# objects as published
PROTOCOLS = {"detection": {"score": 3}}


def stage_inputs(
    *,
    task: str,
    model: str,
    fields: Mapping[str, Mapping[str, Any]],
    train_fingerprint: str,
    test_fingerprint: str,
    backbone: str | None,
    seed: int,
    limit: int = 0,
    protocol: Mapping[str, int] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
    precision: str | None = None,
) -> dict[str, dict[str, Any]]:
    """What each stage depends on; `fields` are the recipe's fields by stage, `backbone` is a fingerprint.

    `more` holds, by stage, inputs that only some runs have; `precision` is what training's `precision=auto` was, where
    that is not fp32.
    """
    more = more or {}
    protocol = dict.fromkeys(STAGES, 1) | PROTOCOLS.get(task, {}) | dict(protocol or {})
    train = {
        "task": task,
        "model": model,
        "recipe": fields["train"],
        "data": train_fingerprint,
        "backbone": backbone,
        "seed": seed,
        "limit": limit,
        **({"precision": precision} if precision else {}),
    }
    return {
        "train": {**train, "protocol": protocol["train"], **more.get("train", {})},
        "predict": {
            "recipe": fields["predict"],
            "data": test_fingerprint,
            "protocol": protocol["predict"],
            **more.get("predict", {}),
        },
        "score": {"recipe": fields["score"], "protocol": protocol["score"], **more.get("score", {})},
    }


def stage_keys(inputs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The key of each stage: of its inputs and of the stage before it."""
    keys, previous = {}, ""
    for stage in STAGES:
        keys[stage] = previous = digest(previous, inputs[stage])
    return keys


def evaluated_in(cell: Mapping[str, Any]) -> str:
    """The arithmetic a cell.json was evaluated in; one of before names a single `precision`."""
    return cell["eval_precision"] if "eval_precision" in cell else cell["precision"]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name=old (now new)` for every value that differs, nested ones as `outer.name`."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{name}.")
        elif before != now:
            lines.append(f"{prefix}{name}={before} (now {now})")
    return lines


def code_files(task: str) -> list[Path]:
    """The files that a task's cells are computed by: its own folder's and the ground floor's."""
    room = {"classification": "pretrain", "robustness": "pretrain"}.get(task, task)
    shared = [
        p
        for p in sorted((ROOT / "common").rglob("*.py"))
        if p.parts[len(ROOT.parts) + 1] not in ("board", "report", "grid", "cli") and "scenes" not in p.parts
    ]
    return [*shared, *sorted((ROOT / room).glob("*.py"))]


@functools.cache
def code_hash(task: str) -> str:
    """A hash of the code a task's cells depend on, comments and docstrings left out: shown as drift, never in a key."""
    return digest(*(_code_without_prose(path, path.stat().st_mtime_ns) for path in code_files(task)))


@functools.cache
def _code_without_prose(path: Path, changed: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)
