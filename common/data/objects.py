"""What readers of boxes share: the frame that boxes live in, boxes that leave it, and the finished set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.data.fingerprint import fingerprint
from common.data.layout import Report
from common.data.types import DetectionSet, Truth
from common.errors import UserError


@dataclass
class Objects:
    """Objects of many images, flat. `box`: float64 (k, 4) x0, y0, x1, y1, half-open, as the file says.

    `image`, `label`: int64 (k,). `difficult`: bool (k,). `where`: each object's place, for reports. `bad`: bool
    (k,) masks by the rule that drops an object for what the file says of its corners. `left_out`: bool (k,), nothing to
    train on (crowd regions). `area`: float64 (k,), where the file says one.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    difficult: np.ndarray
    where: list[str]
    bad: dict[str, np.ndarray]
    left_out: np.ndarray | None = None
    area: np.ndarray | None = None


def frames(
    headers: np.ndarray,
    said: Sequence[Sequence[float] | None],
    places: Sequence[str],
    report: Report,
    form: str,
) -> np.ndarray:
    """int64 (n, 2): width and height of the frame in which each image's boxes were drawn.

    `headers` is of `read_headers`; `said` is what the annotations (`form`: XML, JSON) say, or None. That is the
    stored size, or the EXIF-turned one when the annotation says that; the image's own header wins over both.
    """
    stored = headers[:, :2]
    sizes = stored.copy()
    for i, (size, place) in enumerate(zip(said, places)):
        width, height, orientation = headers[i].tolist()
        if width == 0:
            continue
        turned = orientation >= 5 and size is not None and list(size) == [height, width]
        if turned and width != height:
            sizes[i] = height, width
            report.note("boxes drawn on the EXIF-turned image: read turned", place)
            continue
        if orientation != 1:
            report.note("EXIF rotation not applied: the boxes are taken as drawn on the stored pixels", place)
        if size is None:
            report.note(
                f"{form} without {'<size>' if form == 'XML' else 'size'}: the image's own taken", place
            )
        elif list(size) != [width, height]:
            shown = f"{place}, {size[0]:g} × {size[1]:g} for {width} × {height}"
            report.note(f"wrong size in the {form}: the image's own taken", shown)
    return sizes


def clip(
    found: Objects, sizes: np.ndarray, report: Report, slack: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes clipped to their images (k, 4), and which of them are kept, bool (k,). What was done is noted.

    `slack` is 1 where pixels are counted from 1: a first pixel 0 is then a box a pixel off, not one outside.
    """

    def note(rule: str, fired: np.ndarray) -> None:
        if fired.any():
            report.note(rule, found.where[int(np.argmax(fired))], int(fired.sum()))

    # an unreadable image has no size yet; the image check names it
    limits = np.where(sizes > 0, sizes, np.iinfo(np.int64).max)[found.image]
    clipped = np.clip(found.box, 0, np.hstack([limits, limits]))
    keep = np.ones(len(found.image), bool) if found.left_out is None else ~found.left_out
    for rule, bad in found.bad.items():
        note(f"box with {rule}: dropped", bad & keep)
        keep &= ~bad
    outside = keep & (clipped[:, :2] >= clipped[:, 2:]).any(1)
    keep &= ~outside
    low, high = found.box[:, :2], found.box[:, 2:]
    note("box wholly outside its image: dropped", outside)
    if slack:
        zero = keep & ((low >= -slack) & (low < 0)).any(1)
        note("box with xmin or ymin 0, where VOC counts from 1: clipped", zero)
    note("box reaches outside its image: clipped", keep & ((low < -slack) | (high > limits)).any(1))
    return clipped, keep


def finished_set(
    name: str,
    classes: list[str],
    ids: list,
    paths: list[Path],
    headers: np.ndarray,
    said: Sequence[Sequence[float] | None],
    found: Objects,
    *,
    places: Sequence[str],
    form: str,
    listed: Path,
    annotations: Sequence[Path],
    settings: Any,
    report: Report,
    slack: float = 0.0,
) -> DetectionSet:
    """The set of these images and objects, every rule applied and noted. UserError when no object is left."""
    sizes = frames(headers, said, places, report, form)
    boxes, keep = clip(found, sizes, report, slack)
    if not keep.any():
        why = f" ({'; '.join(report.lines()[:3])})" if report.lines() else ""
        raise UserError(f"{listed}: its images have no usable object{why}")
    rows = np.flatnonzero(keep)
    rows = rows[np.argsort(found.image[rows], kind="stable")]
    counts = np.bincount(found.image[rows], minlength=len(ids))
    if (counts == 0).any():
        first = places[int(np.argmin(counts))]
        report.note("image without objects: kept, all background", first, int((counts == 0).sum()))
    cuts = np.cumsum(counts)[:-1]
    repaired = ~keep | (boxes != found.box).any(1)
    return DetectionSet(
        name,
        classes,
        ids,
        paths,
        sizes,
        np.split(boxes[rows].astype(np.float32), cuts),
        np.split(found.label[rows], cuts),
        np.split(found.difficult[rows], cuts),
        fingerprint(settings, ids, paths, annotations),
        report.lines(),
        problems=report.problems(),
        truth=_truth(found, repaired, len(ids)),
    )


def _truth(found: Objects, repaired: np.ndarray, images: int) -> list[Truth]:
    """Every object as the file says it, by image."""
    order = np.argsort(found.image, kind="stable")
    cuts = np.cumsum(np.bincount(found.image, minlength=images))[:-1]
    columns = (found.box, found.label, found.difficult, repaired, found.area)
    parts = [[None] * images if c is None else np.split(c[order], cuts) for c in columns]
    return [Truth(*row) for row in zip(*parts)]
