"""Reading finished cells, and their scores under resampled test images."""

import json
import zipfile
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.cache import cache_folder
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, file_digest, read_json, write_npz
from backbench.common.board.statistics import draw_weights
from backbench.common.metrics import rescore
from backbench.common.run.cell import SCHEMA, Identity
from backbench.common.run.keys import evaluated_in

REPLICATES = 1000
AT_ONCE = 32  # cells whose statistics are in memory together


@dataclass(frozen=True)
class Cell:
    """One finished measurement, as its cell.json says. `written`: when, in seconds, of the file's own time."""

    folder: Path
    written: float
    identity: Identity
    metrics: Mapping[str, float | None]
    chance: Mapping[str, float]
    primary: str
    cost: Mapping[str, float]
    keys: Mapping[str, str]
    notes: tuple[str, ...]
    inputs: Mapping[str, Any]
    files: Mapping[str, str]
    backbone: Mapping[str, Any]
    code: str
    device: Mapping[str, Any]
    train_precision: str | None  # None: nothing was trained
    eval_precision: str
    skipped_images: int
    baselines: Mapping[str, Mapping[str, float]]  # what needs no network scores, by name

    @property
    def arithmetic(self) -> str:
        """The arithmetic of training and evaluation, in words."""
        trained = f"trained in {self.train_precision}, " if self.train_precision else ""
        return f"{trained}evaluated in {self.eval_precision}"

    @property
    def scratch(self) -> bool:
        """Whether the backbone had random weights."""
        return str(self.backbone.get("source", "")).partition(":")[0] == "scratch"

    @property
    def pretraining(self) -> Hashable:
        """Which pretraining it stands on: its seed, else the backbone's name.

        A pretraining cell is one itself, and random weights are drawn anew for every seed.
        """
        known = self.identity.pretrain_seed
        if self.identity.task == "classification" or self.scratch:
            return self.identity.seed
        return self.identity.backbone if known is None else known

    def images(self) -> dict[str, np.ndarray]:
        """The arrays of images.npz. Raises UserError when it is missing, damaged or not this cell's."""
        path = self.folder / "images.npz"
        try:
            if file_digest(path) != self.files.get("images.npz"):
                raise UserError(
                    f"{path}: not the file this cell was scored from; copy the folder again, whole"
                )
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); copy the folder again, whole") from None

    @cached_property
    def ids(self) -> list[str]:
        """The ordered ids of its test images: equal ones can be paired."""
        return [str(i) for i in self.images()["ids"].tolist()]

    def log(self) -> list[dict[str, float]]:
        """The lines of log.jsonl; none where there is no log, an unfinished last line left out."""
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found


def load_cells(folder: Path | str) -> list[Cell]:
    """All cells below a folder, ordered by path; those scored on held-out training images (a sweep's) left out.

    Raises UserError, in one line that names up to three files, when a cell.json is damaged or of an unknown schema.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of results")
    cells, problems = [], []
    for path in sorted(folder.rglob("cell.json")):
        try:
            cell = read_cell(path)
            if not cell.identity.val_share:
                cells.append(cell)
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - 3} more" if problems[3:] else ""
        raise UserError("; ".join(problems[:3]) + more)
    return cells


def read_cell(path: Path | str) -> Cell:
    """Read one cell.json. Raises UserError naming it."""
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{path}: not a cell; remove it, and run its command again")
    if content["schema"] != SCHEMA:
        raise UserError(
            f"{path}: schema {content['schema']!r} is unknown here ({SCHEMA} is read): update backbench"
        )
    try:
        known = {f.name for f in fields(Identity)}
        identity = Identity(**{k: v for k, v in content["identity"].items() if k in known})
        cell = Cell(
            folder=path.parent,
            written=path.stat().st_mtime,
            identity=identity,
            metrics=dict(content["metrics"]),
            chance=dict(content["chance"]),
            primary=content["primary"],
            cost=dict(content["cost"]),
            keys=dict(content["keys"]),
            notes=tuple(content["notes"]),
            inputs=dict(content["inputs"]),
            files=dict(content["files"]),
            backbone=dict(content.get("backbone") or {}),
            code=content["code"],
            device=dict(content["device"]),
            train_precision=_trained_in(content),
            eval_precision=evaluated_in(content),
            skipped_images=content["skipped_images"],
            baselines=dict(content.get("baselines") or {}),
        )
        if cell.primary not in cell.metrics:
            raise KeyError(cell.primary)
        return cell
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: damaged cell ({reason}); remove it, and run its command again") from None


def _trained_in(content: Mapping[str, Any]) -> str | None:
    """Training's arithmetic; a cell of before names one for training and evaluation, trained or not."""
    if "train_precision" in content:
        return content["train_precision"]
    return content["precision"] if content["cost"].get("iterations") else None


@dataclass(frozen=True)
class Rescored:
    """A cell's metrics recomputed: `point` a number each, `replicates` (R,) each, of the same R draws of images."""

    point: dict[str, float]
    replicates: dict[str, np.ndarray]


def rescore_cells(cells: list[Cell], replicates: int = REPLICATES, seed: int = 0) -> list[Rescored]:
    """Every cell's metrics as they are and under `replicates` bootstrap draws of its test images.

    The draws depend on the number of images and on `seed` alone: cells of the same images get the same ones. Results
    are remembered in the cache folder under the images' digest and the metrics' code.
    """
    results: dict[int, Rescored] = {}
    todo: dict[int, list[int]] = {}
    for index, cell in enumerate(cells):
        known = _recall(cell, replicates, seed)
        if known:
            results[index] = known
        else:
            todo.setdefault(len(cell.ids), []).append(index)
    for n, members in todo.items():
        for start in range(0, len(members), AT_ONCE):
            batch = members[start : start + AT_ONCE]
            for index, found in zip(batch, _rescore([cells[i] for i in batch], n, replicates, seed)):
                results[index] = found
                _remember(cells[index], found, replicates, seed)
    return [results[index] for index in range(len(cells))]


def _rescore(cells: list[Cell], n: int, replicates: int, seed: int) -> list[Rescored]:
    arrays = [cell.images() for cell in cells]
    blocks: list[list[dict[str, np.ndarray]]] = [[] for _ in cells]
    for weights in draw_weights(n, replicates, np.random.default_rng([seed, n])):
        for block, cell, images in zip(blocks, cells, arrays):
            block.append(rescore(cell.identity.task, images, weights))
    found = []
    for block, cell, images in zip(blocks, cells, arrays):
        point = {k: float(v[0]) for k, v in rescore(cell.identity.task, images, None).items()}
        found.append(Rescored(point, {k: np.concatenate([b[k] for b in block]) for k in point}))
    return found


@cache
def _metrics_code() -> str:
    folder = Path(__file__).resolve().parents[1] / "metrics"
    return digest(*(file_digest(path) for path in sorted(folder.glob("*.py"))))


def _cache_file(cell: Cell, replicates: int, seed: int) -> Path | None:
    key = digest(
        "replicates 1", cell.identity.task, cell.files.get("images.npz"), replicates, seed, _metrics_code()
    )
    try:
        return cache_folder("board") / f"{key}.npz"
    except UserError:
        return None  # no cache folder can be made: everything is computed


def _recall(cell: Cell, replicates: int, seed: int) -> Rescored | None:
    path = _cache_file(cell, replicates, seed)
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            return Rescored(dict(zip(names, file["point"].tolist())), dict(zip(names, file["replicates"])))
    except (OSError, TypeError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _remember(cell: Cell, found: Rescored, replicates: int, seed: int) -> None:
    path = _cache_file(cell, replicates, seed)
    names = list(found.point)
    try:
        if path and names:
            write_npz(
                path,
                names=np.array(names),
                point=np.array([found.point[k] for k in names]),
                replicates=np.stack([found.replicates[k] for k in names]),
            )
    except OSError:
        return  # a full or read-only cache costs time, nothing else
