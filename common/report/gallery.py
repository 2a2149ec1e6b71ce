"""The same test images for every backbone: boxes, captions and activation maps, from thumbnails and predictions."""

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from backbench.common.board.cells import Cell
from backbench.common.board.columns import Column
from backbench.common.board.leaderboard import Board, Row
from backbench.common.data.thumbnails import read_thumbnails, read_truth
from backbench.common.data.types import hash_order
from backbench.common.metrics.average_precision import IGNORED, RIGHT
from backbench.common.metrics.captions import per_image
from backbench.common.report.details import report_of

DISAGREED, DRAWN = 4, 4  # images a column: those the backbones disagree about most, and a fixed random choice
MOST_BOXES = 6
MAP_SIDE = 48  # pixels of an embedded heat map: it is a blur of 4 to 28 cells anyway

# anchors of viridis (matplotlib, CC0): dark blue, green, yellow; told apart by lightness alone too
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)


@dataclass
class Panel:
    """One backbone's answer to one image."""

    row: Row
    index: int  # of its colour
    picture: Markup | None = None
    lines: list[tuple[str, bool]] = field(default_factory=list)  # text, and whether it is good news


@dataclass
class Shown:
    """One image and every backbone's answer. `picture` is set where the answers are texts."""

    name: str
    disagreed: bool  # chosen because the backbones disagree about it, else drawn
    panels: list[Panel]
    picture: Markup | None = None


@dataclass
class Thumbnail:
    """A small JPEG that the page holds once, as an SVG symbol that all pictures of it use."""

    symbol: str
    data: bytes
    size: tuple[int, int]  # original width and height
    scale: tuple[float, float]
    truth: np.ndarray | None = None  # true boxes (k, 4), shares of width and height

    @property
    def shape(self) -> tuple[float, float]:
        """Width and height of the small picture."""
        return self.size[0] * self.scale[0], self.size[1] * self.scale[1]

    def define(self) -> Markup:
        """The symbol's definition."""
        width, height = self.shape
        return Markup(
            f'<symbol id="{self.symbol}" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none">'
            f'<image width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
            f'href="{_data_uri(self.data, "jpeg")}"/></symbol>'
        )

    def picture(self, parts: list[str], title: str) -> Markup:
        """The image with further SVG elements over it."""
        width, height = self.shape
        under = 1 if parts and parts[0].startswith("<image") else 0  # a heat map would hide the true boxes
        for x0, y0, x1, y1 in [] if self.truth is None else (self.truth * np.tile(self.shape, 2)).tolist():
            shape = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
            both = [f'<rect class="shade" {shape}/>', f'<rect class="box truth" {shape}/>']
            parts = [*parts[:under], *both, *parts[under:]]
        return Markup(
            f'<svg class="photo" viewBox="0 0 {width:g} {height:g}" role="img"><title>{Markup.escape(title)}</title>'
            f'<use href="#{self.symbol}" width="{width:g}" height="{height:g}"/>{"".join(parts)}</svg>'
        )


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def gallery(board: Board, column: Column, number: int) -> tuple[list[Shown], list[Thumbnail]]:
    """What the report shows of a column: nothing where thumbnails or predictions did not travel with the cells.

    Of the thumbnails, themselves a fixed random choice of the test images, first those DISAGREED ones whose `quality`
    differs most between the backbones (standard deviation; random weights do not count), then the first DRAWN of the
    others in the order of a hash of their ids. Each backbone shows its first seed's answer.
    """
    cells = {row.key: board.entries[row.key, column.key].cells for row in board.rows}
    first = {key: min(found, key=lambda c: c.identity.seed) for key, found in cells.items() if found}
    reader = READERS.get(column.task)
    folders = [folder for cell in first.values() for folder in cell.folder.absolute().parents[3:4]]
    path = next((f / "thumbnails.npz" for f in folders if (f / "thumbnails.npz").exists()), None)
    if path is None or reader is None:
        return [], []
    small, truth = read_thumbnails(path), read_truth(path)
    rows = [row for row in board.rows if row.key in first and not row.scratch]
    chosen = choose(list(small), [quality(first[row.key]) for row in rows])
    thumbnails = {
        name: Thumbnail(f"image-{number}-{k}", *small[name], truth.get(name)) for k, name in enumerate(chosen)
    }
    shown = [
        Shown(name, why, [], thumbnails[name].picture([], name) if column.task == "captioning" else None)
        for name, why in chosen.items()
    ]
    for index, row in enumerate(board.rows):
        cell = first.get(row.key)
        answer = reader(cell) if cell else None
        if answer is None:
            continue
        for image in shown:
            panel = Panel(row, index)
            answer(panel, image.name, thumbnails[image.name])
            if panel.picture is not None or panel.lines:
                image.panels.append(panel)
    shown = [image for image in shown if image.panels]
    return shown, [thumbnails[image.name] for image in shown]


def choose(ids: list[str], qualities: list[Mapping[str, float]]) -> dict[str, bool]:
    """Which images to show: id → whether the backbones' qualities disagree about it (else it is drawn)."""
    order = [ids[i] for i in hash_order(ids)]
    known = [name for name in order if all(name in quality for quality in qualities)]
    apart = (
        {name: float(np.std([quality[name] for quality in qualities])) for name in known} if qualities else {}
    )
    most = (
        sorted((name for name in known if apart[name] > 0), key=lambda name: -apart[name])
        if qualities
        else []
    )
    chosen = dict.fromkeys(most[:DISAGREED], True)
    return chosen | dict.fromkeys([name for name in order if name not in chosen][:DRAWN], False)


def quality(cell: Cell) -> dict[str, float]:
    """How good a cell's answer to each image is, by id.

    Detection: F1 of the boxes from `best_threshold` on; captions: CIDEr; localisation: IoU of the true class's box.
    """
    stats = cell.images()
    if cell.identity.task == "captioning":
        values = per_image(stats)["CIDEr"]
    elif cell.identity.task == "wsol":
        values = stats["iou_gt"]
    else:
        shown = (stats["score"] >= best_threshold(stats)) & (stats["mark"] != IGNORED)
        n = len(cell.ids)
        right = np.bincount(stats["image"][shown & (stats["mark"] == RIGHT)], minlength=n)
        both = np.bincount(stats["image"][shown], minlength=n) + stats["positives"].sum(1)
        values = np.where(both > 0, 2 * right / np.maximum(1, both), 1.0)
    return dict(zip(cell.ids, np.asarray(values, float).tolist()))


Answer = Callable[[Panel, str, Thumbnail], None]


def _predictions(cell: Cell) -> dict[str, list[dict[str, Any]]] | None:
    """predictions.json by image id; None when it did not travel with the cell."""
    path = cell.folder / "predictions.json"
    if not path.exists():
        return None
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        found.setdefault(str(entry["image_id"]), []).append(entry)
    return found


def _positions(cell: Cell) -> dict[str, int]:
    return {name: i for i, name in enumerate(cell.ids)}


def class_names(cell: Cell) -> list[str]:
    """Names of the classes in their order, from report.json."""
    return list(report_of(cell).get("classes", {}))


def detections(cell: Cell) -> Answer | None:
    """Boxes over the image; a right one is drawn solid, a wrong one dashed, one on a difficult object dotted."""
    predictions, positions, names = _predictions(cell), _positions(cell), class_names(cell)
    if predictions is None:
        return None
    label_of = {category: c for c, category in enumerate(report_of(cell).get("category_ids", []))}
    stats = cell.images()
    lowest = best_threshold(stats)

    def answer(panel: Panel, name: str, thumbnail: Thumbnail) -> None:
        if name not in positions:
            return
        mine = stats["image"] == positions[name]
        marks = {
            (int(label), float(score)): int(mark)
            for label, score, mark in zip(stats["label"][mine], stats["score"][mine], stats["mark"][mine])
        }
        found = sorted(predictions.get(name, []), key=lambda entry: -entry["score"])
        found = [entry for entry in found if np.float32(entry["score"]) >= lowest][:MOST_BOXES]
        parts, right = [], 0
        for entry in reversed(found):
            label = label_of.get(entry["category_id"], entry["category_id"] - 1)
            mark = marks.get((label, float(np.float32(entry["score"]))))
            style = {RIGHT: "right", IGNORED: "ignored"}.get(mark, "wrong")
            right += style == "right"
            text = names[label] if label < len(names) else f"class {label + 1}"
            parts += _box(entry["bbox"], thumbnail, style, f"{text} {100 * entry['score']:.0f}")
        panel.picture = thumbnail.picture(parts, f"{panel.row.label}: {len(found)} boxes, {right} right")
        text = f"{right} of {len(found)} right" if found else f"no box scores {100 * lowest:.0f}"
        panel.lines.append((text, bool(found) and right == len(found)))

    return answer


def best_threshold(stats: Mapping[str, np.ndarray]) -> float:
    """The score from which on a detector's boxes have the largest F1 over its test images.

    Detectors are calibrated differently: one threshold for all would show nothing of one and everything of another.
    """
    counted = stats["mark"] != IGNORED
    order = np.argsort(-stats["score"][counted], kind="stable")
    score, right = stats["score"][counted][order], stats["mark"][counted][order] == RIGHT
    if not right.any():
        return 0.5
    f1 = 2 * np.cumsum(right) / (stats["positives"].sum() + np.arange(1, len(right) + 1))
    return float(score[np.argmax(f1)])


def _box(box: list[float], thumbnail: Thumbnail, style: str, text: str) -> list[str]:
    """A box x, y, width, height in pixels of the original, with its label inside its top edge."""
    x, y, w, h = (round(v * s, 1) for v, s in zip(box, thumbnail.scale * 2))
    width, height = thumbnail.shape
    size = round(max(width, height) / 18, 1)
    low = min(max(y + size, size), height - 2)
    left = min(max(x + 2, 1), max(1, width - 0.56 * size * len(text)))
    shape = f'x="{x}" y="{y}" width="{w}" height="{h}"'
    return [
        f'<rect class="halo" {shape}/><rect class="box {style}" {shape}/>',
        f'<text class="tag" x="{left:.1f}" y="{low:.1f}" font-size="{size}">{Markup.escape(text)}</text>',
    ]


def spoken(cell: Cell) -> Answer | None:
    """The caption and its own CIDEr."""
    predictions, positions = _predictions(cell), _positions(cell)
    if predictions is None:
        return None
    cider = per_image(cell.images())["CIDEr"]

    def answer(panel: Panel, name: str, thumbnail: Thumbnail) -> None:
        if name in predictions and name in positions:
            value = float(cider[positions[name]])
            panel.lines.append((f"{predictions[name][0]['caption']}", value >= 1.0))
            panel.lines.append((f"CIDEr {100 * value:.0f}", value >= 1.0))

    return answer


def activations(cell: Cell) -> Answer | None:
    """The true class's activation map over the image, and the box made from it."""
    path = cell.folder / "scoremaps.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        where = {str(name): i for i, name in enumerate(file["ids"].tolist())}
        maps, window = file["maps"], file["window"]
    stats, positions = cell.images(), _positions(cell)

    def answer(panel: Panel, name: str, thumbnail: Thumbnail) -> None:
        if name not in where or name not in positions:
            return
        i = positions[name]
        width, height = thumbnail.shape
        x0, y0, x1, y1 = window * np.array([width, height, width, height])
        place = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}"'
        heat = _data_uri(heat_map(maps[where[name]][0]), "png")
        box = stats["box_gt"][i] * np.array([*thumbnail.size, *thumbnail.size])
        overlap, right = float(stats["iou_gt"][i]), int(stats["rank"][i]) == 0
        drawn = _box(
            [*box[:2], *(box[2:] - box[:2])],
            thumbnail,
            "right" if overlap > 0.5 else "wrong",
            f"IoU {overlap:.2f}",
        )
        parts = [f'<image class="heat" preserveAspectRatio="none" {place} href="{heat}"/>', *drawn]
        panel.picture = thumbnail.picture(parts, f"{panel.row.label}: IoU {overlap:.2f}")
        text = "class right" if right else f"class wrong (rank {int(stats['rank'][i]) + 1})"
        panel.lines.append((text, right and overlap > 0.5))

    return answer


def heat_map(shares: np.ndarray) -> bytes:
    """A map (h, w) of values in [0, 1] as a small PNG in viridis, bilinear like the evaluation's."""
    gray = Image.fromarray(np.asarray(shares, np.float32)).resize((MAP_SIDE, MAP_SIDE), Image.BILINEAR)
    value = np.clip(np.asarray(gray), 0, 1) * (len(VIRIDIS) - 1)
    colour = np.stack([np.interp(value, np.arange(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)], -1)
    buffer = io.BytesIO()
    quantised = Image.fromarray(colour.round().astype(np.uint8)).quantize(48, dither=Image.Dither.NONE)
    quantised.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


READERS: dict[str, Callable[[Cell], Answer | None]] = {
    "detection": detections,
    "captioning": spoken,
    "wsol": activations,
}
