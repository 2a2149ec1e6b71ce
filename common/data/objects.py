"""What readers of boxes share: the frame that boxes live in, boxes that leave it, and the finished set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import Report
from backbench.common.data.types import DetectionSet, Truth


@dataclass
class Objects:
    """Objects of many images, flat. `box`: float64 (k, 4) x0, y0, x1, y1, half-open, as the file says.

    `image`, `label`: int64 (k,). `difficult`: bool (k,). `where`: each object's place, for reports. `bad`: bool
    (k,) masks by the rule that drops an object for what the file says of its corners; the rules of `wrong` are problems
    of the file. `left_out`: bool (k,), nothing to train on (crowd regions). `area`: float64 (k,), if the file says it.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    difficult: np.ndarray
    where: list[str]
    bad: dict[str, np.ndarray]
    wrong: tuple[str, ...] = ()
    left_out: np.ndarray | None = None
    area: np.ndarray | None = None


def frames(
    headers: np.ndarray,
    said: Sequence[Sequence[float] | None],
    places: Sequence[str],
    report: Report,
    form: str,
) -> np.ndarray:
    """int64 (n, 2): width and height of the frame in which each image's boxes live.

    `headers` is of `read_headers`; `said` is what the annotations (`form`: XML, JSON) say, or None. The frame is the
    stored image, or the EXIF-turned one when the annotation's size is that, or has its shape.
    """
    sizes = headers[:, :2].copy()
    for i, (size, place) in enumerate(zip(said, places)):
        width, height, orientation = headers[i].tolist()
        if width == 0:
            continue
        stored, turned = (width, height), (height, width)
        if orientation >= 5 and width != height and _fit(size, turned) > _fit(size, stored):
            sizes[i] = turned
            report.note("boxes drawn on the EXIF-turned image: read turned", place)
            continue
        if orientation != 1:
            report.note("EXIF rotation not applied: the boxes are taken as drawn on the stored pixels", place)
        if size is None:
            report.note(
                f"{form} without {'<size>' if form == 'XML' else 'size'}: the image's own taken", place
            )
    return sizes


def _fit(said: Sequence[float] | None, size: Sequence[int]) -> int:
    """How well the size an annotation says is an image's: 3 it is, 2 but for a pixel, 1 at another scale, 0 not."""
    if said is None:
        return 0
    if list(said) == list(size):
        return 3
    pairs = list(zip(said, size))
    near = [abs(a - b) <= 1 for a, b in pairs]
    one_ratio = max((b - 1) / a for a, b in pairs) <= min((b + 1) / a for a, b in pairs)
    return 2 if all(near) else int(one_ratio and not any(near))


def scales(
    sizes: np.ndarray,
    said: Sequence[Sequence[float] | None],
    places: Sequence[str],
    paths: Sequence[Path],
    found: Objects,
    report: Report,
    form: str,
    rescale: bool,
) -> np.ndarray:
    """float64 (n, 2): what to multiply each image's x and y by, so that its boxes are in pixels of its frame `sizes`.

    It is 1 unless `rescale`. Without, UserError names an image whose boxes are for another scale: the size that its
    annotation says has the image's shape, or holds boxes that the image does not. Any other size is noted.
    """
    factors = np.ones((len(sizes), 2))
    reach = np.zeros((len(sizes), 2))
    np.maximum.at(reach, found.image, found.box[:, 2:])
    apart = []
    for i, (size, place) in enumerate(zip(said, places)):
        own = sizes[i].tolist()
        fit = _fit(size, own)
        if size is None or fit == 3 or own[0] == 0:
            continue
        shown = f"{place}, {size[0]:g} × {size[1]:g} for {own[0]} × {own[1]}"
        turned = list(size) == own[::-1]
        beyond = (reach[i] > sizes[i] + 1).any() and (reach[i] <= np.add(size, 1)).all()
        if rescale and fit < 2 and not turned:
            factors[i] = sizes[i] / size
            report.note(f"boxes for another size in the {form}: rescaled to the image's", shown)
        elif reach[i].any() and (fit == 1 or (fit == 0 and beyond)):
            remedy = (
                "turn the image" if turned else "if it was resized, add rescale=1 to the options of --data"
            )
            apart.append(
                f"{paths[i]}: is {own[0]} × {own[1]}, and {place} has boxes for {size[0]:g} × {size[1]:g}; {remedy}"
            )
        else:
            note = report.note if fit == 2 or not reach[i].any() else report.problem
            note(f"wrong size in the {form}: the image's own taken", shown)
    if apart:
        raise UserError(
            f"{apart[0]}, or correct the size in the {form} ({len(apart)} of {len(sizes)} images)"
        )
    return factors


def clip(
    found: Objects, sizes: np.ndarray, report: Report, slack: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes clipped to their images (k, 4), and which of them are kept, bool (k,). What was done is noted.

    `slack` is 1 where pixels are counted from 1: a first pixel 0 is then a box a pixel off, not one outside.
    """

    def note(rule: str, fired: np.ndarray, problem: bool = False) -> None:
        if fired.any():
            say = report.problem if problem else report.note
            say(rule, found.where[int(np.argmax(fired))], int(fired.sum()))

    # an unreadable image has no size yet; the image check names it
    limits = np.where(sizes > 0, sizes, np.iinfo(np.int64).max)[found.image]
    clipped = np.clip(found.box, 0, np.hstack([limits, limits]))
    keep = np.ones(len(found.image), bool) if found.left_out is None else ~found.left_out
    for rule, bad in found.bad.items():
        note(f"box with {rule}: dropped", bad & keep, rule in found.wrong)
        keep &= ~bad
    outside = keep & (clipped[:, :2] >= clipped[:, 2:]).any(1)
    keep &= ~outside
    low, high = found.box[:, :2], found.box[:, 2:]
    note("box wholly outside its image: dropped", outside, True)
    if slack:
        zero = keep & ((low >= -slack) & (low < 0)).any(1)
        note("box with xmin or ymin below 1, from which VOC counts: clipped", zero)
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
    rescale: bool = False,
    slack: float = 0.0,
) -> DetectionSet:
    """The set of these images and objects, every rule applied and noted. UserError when no object is left."""
    said = [size if size and all(side > 0 for side in size) else None for size in said]
    sizes = frames(headers, said, places, report, form)
    factors = scales(sizes, said, places, paths, found, report, form, rescale)
    found.box = found.box * np.tile(factors, 2)[found.image]
    if found.area is not None:
        found.area = found.area * factors.prod(1)[found.image]
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
