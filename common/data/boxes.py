"""Box lists `path,x0,y0,x1,y1`: boxes as shares of an image's width and height, several rows an image."""

import csv
import math
from pathlib import Path

import numpy as np

from common.data.layout import Report
from common.errors import UserError

HEADER = ["path", "x0", "y0", "x1", "y1"]


def read_box_csv(path: Path, report: Report) -> dict[str, np.ndarray]:
    """Boxes by image path (as written, `/` between parts): float64 (k, 4) x0, y0, x1, y1, shares in [0, 1].

    Boxes a little outside are clipped, boxes without area dropped, both noted in `report`. Raises UserError
    with file and line for a wrong header, a row that is not five fields, and a number that is no share.
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
                if box[0] >= box[2] or box[1] >= box[3]:
                    report.note("box with no area: dropped", f"{path.name} line {rows.line_num}")
                    continue
                clipped = [min(max(value, 0.0), 1.0) for value in box]
                if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
                    report.note("box wholly outside its image: dropped", f"{path.name} line {rows.line_num}")
                    continue
                if clipped != box:
                    report.note("box reaches outside its image: clipped", f"{path.name} line {rows.line_num}")
                kept.append(clipped)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    boxes = {key: value for key, value in boxes.items() if value}
    if not boxes:
        raise UserError(f"{path}: holds no box; expected rows of {','.join(HEADER)}")
    return {key: np.array(value, np.float64) for key, value in boxes.items()}


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
    return box
