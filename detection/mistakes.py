"""What a detector did wrong, by kind, and pictures of its surest mistakes.

The kinds are those of Hoiem et al. (ECCV 2012) and TIDE (Bolya et al., ECCV 2020), at IoU .5 and .1. Of a detection
that is wrong the object it overlaps most, of whatever class, decides:

- duplicate: IoU >= .5 with an object of its own class, which a surer detection has claimed;
- localisation: IoU from .1 to .5, and the object is of its own class;
- confusion: IoU >= .1, and the object is of another class;
- background: IoU < .1 with every object;
- missed: an object (not a difficult one) that no detection claims. Of these the largest come first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backbench.common.data.decode import read_rgb
from backbench.common.data.pictures import write_jpeg
from backbench.common.data.types import DetectionSet
from backbench.common.metrics.average_precision import (
    IGNORED,
    RIGHT,
    WRONG,
    Boxes,
    most_overlapped,
    ranked,
    rescore,
)

FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("localisation", "confusion", "background", "duplicate", "missed")
ACROSS, DOWN, SIDE, CAPTION = 4, 2, 220, 34  # tiles of a sheet, and their pixels
WRONG_BOX, OBJECT_BOX = (230, 60, 20), (60, 220, 250)  # told apart by lightness too


@dataclass
class Mistakes:
    """Every detection judged, in `match`'s order. `kind`: int (k,) index into KINDS, -1 where it is no mistake.

    `target`, `iou`: (k,) the object it overlaps most and how much (-1: its image has none). `found` holds the
    detections in that order; `missed` the indices of missed objects, largest first.
    """

    found: Boxes
    truth: Boxes
    kind: np.ndarray
    target: np.ndarray
    iou: np.ndarray
    missed: np.ndarray


def find_mistakes(stats: Mapping[str, np.ndarray], found: Boxes, truth: Boxes) -> Mistakes:
    """Judge detections by the module's rules. `stats` is `match` of the two at IoU .5, by the devkit's convention."""
    classes = stats["positives"].shape[1]
    order = ranked(found)[0]
    found = Boxes(
        found.image[order], found.label[order], found.box[order].astype(np.float64), found.score[order]
    )
    any_best, any_iou = _nearest(found.box, found.image, truth.box, truth.image)
    own_best, own_iou = _nearest(
        *(found.box, found.image * classes + found.label),
        *(truth.box, truth.image * classes + truth.label),
    )
    own = own_iou >= any_iou  # of equals the object of its own class
    target, iou = np.where(own, own_best, any_best), np.maximum(own_iou, any_iou)
    rules = [
        stats["mark"] != WRONG,
        own_iou >= FOREGROUND,
        iou < BACKGROUND,
        own,
    ]
    kind = np.select(
        rules, [-1, KINDS.index("duplicate"), KINDS.index("background"), KINDS.index("localisation")]
    )
    kind[~np.any(rules, 0)] = KINDS.index("confusion")
    duplicate = kind == KINDS.index("duplicate")
    target[duplicate], iou[duplicate] = own_best[duplicate], own_iou[duplicate]
    lost = ~truth.difficult
    lost[own_best[stats["mark"] == RIGHT]] = False
    missed = np.flatnonzero(lost)
    area = (truth.box[:, 2:] - truth.box[:, :2]).prod(1)
    missed = missed[np.argsort(-area[missed], kind="stable")]
    return Mistakes(found, truth, kind, np.where(iou < 0, -1, target), iou, missed)


def _nearest(box, group, true_box, true_group) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(true_group, kind="stable")
    best, iou = most_overlapped(box, group, true_box[order], true_group[order])
    return (order[best] if len(order) else best), iou


def count_mistakes(
    stats: Mapping[str, np.ndarray], made: Mistakes
) -> dict[str, dict[str, float | int | None]]:
    """For each kind: `all`, its number; `sure`, that among the N surest detections of each class, N being the number
    of its objects (Hoiem's choice; missed: None); `mAP_without`, the mAP had these mistakes not been made.
    """
    sure = np.zeros(len(made.kind), bool)
    for c, objects in enumerate(stats["positives"].sum(0).tolist()):
        rows = np.flatnonzero((stats["label"] == c) & (stats["mark"] != IGNORED))
        sure[rows[:objects]] = True
    counts = {}
    for k, name in enumerate(KINDS):
        mine = made.kind == k
        if name == "missed":
            positives = stats["positives"].copy()
            np.subtract.at(positives, (made.truth.image[made.missed], made.truth.label[made.missed]), 1)
            without, number = {**stats, "positives": positives}, len(made.missed)
        else:
            without = {**stats, "mark": np.where(mine, IGNORED, stats["mark"])}
            number = int(mine.sum())
        value = float(rescore(without)["mAP"][0])
        counts[name] = {
            "all": number,
            "sure": None if name == "missed" else int((mine & sure).sum()),
            "mAP_without": None if np.isnan(value) else value,
        }
    return counts


def surest(made: Mistakes, kind: str, most: int = ACROSS * DOWN) -> list[int]:
    """The most confident mistakes of a kind, one an image: rows of `made.found`, of "missed" indices of objects."""
    if kind == "missed":
        rows, image = made.missed, made.truth.image[made.missed]
    else:
        rows = np.flatnonzero(made.kind == KINDS.index(kind))
        rows = rows[np.argsort(-made.found.score[rows], kind="stable")]
        image = made.found.image[rows]
    first = np.sort(np.unique(image, return_index=True)[1])[:most]
    return rows[first].tolist()


def draw_mistakes(folder: Path, made: Mistakes, images: DetectionSet) -> dict[str, str]:
    """Write one contact sheet a kind, `mistakes_KIND.jpg`; the names of those that have something to show.

    The mistaken box is red; the object it overlaps most, or that was missed, light blue.
    """
    written = {}
    for kind in KINDS:
        path = folder / f"mistakes_{kind}.jpg"
        path.unlink(missing_ok=True)
        tiles = [_tile(made, kind, row, images) for row in surest(made, kind)]
        if not tiles:
            continue
        rows = [tiles[k : k + ACROSS] for k in range(0, len(tiles), ACROSS)]
        heights = [max(tile.height for tile in row) + 4 for row in rows]
        sheet = Image.new("RGB", (len(rows[0]) * (SIDE + 4) - 4, sum(heights) - 4), "white")
        for k, row in enumerate(rows):
            for n, tile in enumerate(row):
                sheet.paste(tile, (n * (SIDE + 4), sum(heights[:k])))
        write_jpeg(path, sheet, quality=82)
        written[kind] = path.name
    return written


def _tile(made: Mistakes, kind: str, row: int, images: DetectionSet) -> Image.Image:
    """One picture with its boxes and two lines of caption."""
    names = images.classes
    if kind == "missed":
        i, box, target = int(made.truth.image[row]), None, row
        lines = [f"{names[made.truth.label[row]]}: not found", f"{images.ids[i]}"]
    else:
        i, box, target = int(made.found.image[row]), made.found.box[row], int(made.target[row])
        lines = [f"{names[made.found.label[row]]} {made.found.score[row]:.2f}", f"{images.ids[i]}"]
        if made.iou[row] >= BACKGROUND:
            lines[0] += f", IoU {made.iou[row]:.2f} with {names[made.truth.label[target]]}"
        else:
            target = -1
    pixels = read_rgb(images.paths[i], frame=images.sizes[i])
    scale = SIDE / max(pixels.shape[:2])
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    tile = Image.new("RGB", (SIDE, size[1] + CAPTION), "white")
    tile.paste(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), (0, 0))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(size=12)
    if target >= 0:
        _outline(draw, made.truth.box[target] * scale, OBJECT_BOX, size)
    if box is not None:
        _outline(draw, box * scale, WRONG_BOX, size)
    for n, line in enumerate(lines):
        draw.text((2, size[1] + 2 + 15 * n), line[:40], fill="black", font=font)
    return tile


def _outline(
    draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple[int, int, int], size: list[int]
) -> None:
    x0, y0, x1, y1 = np.clip(box, 0, [size[0] - 1, size[1] - 1] * 2).round().tolist()
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))  # published corners may be swapped
    draw.rectangle((x0, y0, x1, y1), outline="black", width=4)
    draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1)), outline=colour, width=2)
