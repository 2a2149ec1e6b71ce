"""Boxes as shares of an image's width and height: from lists `path,x0,y0,x1,y1`, or from pixels."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.decode import read_headers
from backbench.common.data.layout import Report

HEADER = ["path", "x0", "y0", "x1", "y1"]
ALL_DROPPED = "image of which every box was dropped: a miss where it is scored"


def read_box_csv(path: Path, report: Report) -> dict[str, np.ndarray]:
    """Boxes by image path (as written, `/` between parts): float64 (k, 4) x0, y0, x1, y1, shares in [0, 1].

    Boxes a little outside are clipped, boxes without area dropped, both noted in `report`; an image that loses all of
    its boxes stays, with an empty (0, 4) array: a miss. Raises UserError with file and line for a wrong header, a row
    that is not five fields, a number that is no share, and swapped corners.
    """
    boxes: dict[str, list[list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = [cell.strip() for cell in next(rows, [])]
            if header != HEADER:
                raise UserError(
                    f"{path} line 1: header is '{','.join(header)}', expected '{','.join(HEADER)}'"
                )
            for row in rows:
                if not row:
                    continue
                where = f"{path} line {rows.line_num}"
                box = _share_box(row, where)
                kept = boxes.setdefault(row[0].strip(), [])
                if box[0] == box[2] or box[1] == box[3]:
                    report.problem("box with no area: dropped", f"{path.name} line {rows.line_num}")
                    continue
                clipped = [min(max(value, 0.0), 1.0) for value in box]
                if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
                    report.problem(
                        "box wholly outside its image: dropped", f"{path.name} line {rows.line_num}"
                    )
                    continue
                if clipped != box:
                    report.note("box reaches outside its image: clipped", f"{path.name} line {rows.line_num}")
                kept.append(clipped)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    if not any(boxes.values()):
        raise UserError(f"{path}: holds no box; expected rows of {','.join(HEADER)}")
    bare = [key for key, value in boxes.items() if not value]
    if bare:
        report.problem(ALL_DROPPED, bare[0], len(bare))
    return {key: np.array(value, np.float64).reshape(-1, 4) for key, value in boxes.items()}


def _share_box(row: list[str], where: str) -> list[float]:
    if len(row) != 5:
        raise UserError(f"{where}: {len(row)} fields, expected 5 ({','.join(HEADER)})")
    box = []
    for key, text in zip(HEADER[1:], row[1:]):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{where}: {key} is '{text}', not a number")
        # a rounding error is clipped; anything larger was measured in pixels
        if not -0.5 <= value <= 1.5:
            raise UserError(f"{where}: {key} is {text}; boxes are shares of width and height, from 0 to 1")
        box.append(value)
    for low, high in ((0, 2), (1, 3)):
        if box[low] > box[high]:
            raise UserError(
                f"{where}: {HEADER[low + 1]} {box[low]:g} is above {HEADER[high + 1]} {box[high]:g}: swapped corners, "
                f"or columns in another order; write {','.join(HEADER)}"
            )
    return box


def pixel_shares(
    boxes: Sequence[np.ndarray], paths: Sequence[Path], ids: Sequence[str], report: Report
) -> list[np.ndarray]:
    """Boxes in pixels, n × (k, 4) half-open, as shares of the upright image, whose size its header says.

    Boxes that reach outside are clipped; boxes with swapped corners and those that have no area inside are dropped. All
    is in `report`. An image that loses all of its boxes has an empty (0, 4) array: a miss.
    """
    headers = read_headers(paths)
    sizes = np.where(headers[:, 2:] >= 5, headers[:, 1::-1], headers[:, :2])
    sizes = np.maximum(sizes, 1)  # unreadable: the image check names it
    counts = [len(part) for part in boxes]
    owner = np.repeat(np.arange(len(boxes)), counts)
    shares = np.concatenate([np.zeros((0, 4)), *boxes]) / np.tile(sizes[owner], 2)
    clipped = np.clip(shares, 0, 1)
    swapped = (shares[:, :2] > shares[:, 2:]).any(1)
    empty = (clipped[:, :2] >= clipped[:, 2:]).any(1)
    outside = ((shares < 0) | (shares > 1 + 1e-9)).any(1) & ~empty
    readable = headers[owner, 0] > 0
    kept = np.bincount(owner[~empty], minlength=len(boxes))
    bare = (np.array(counts, np.int64) > 0) & (kept == 0) & (headers[:, 0] > 0)
    for note, rule, fired, image in (
        (report.problem, "box with swapped corners: dropped", swapped & readable, owner),
        (report.problem, "box with no area inside its image: dropped", empty & ~swapped & readable, owner),
        (report.note, "box reaches outside its image: clipped", outside & readable, owner),
        (report.problem, ALL_DROPPED, bare, np.arange(len(boxes))),
    ):
        if fired.any():
            note(rule, str(ids[image[np.argmax(fired)]]), int(fired.sum()))
    ends = np.cumsum(counts)
    return [
        clipped[end - count : end][~empty[end - count : end]] for end, count in zip(ends.tolist(), counts)
    ]
