"""The three kinds of data set every task works on: plain arrays and paths; pixels only where a set comes as arrays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.base.files import digest
from backbench.common.data.decode import read_rgb

PER_IMAGE = ("ids", "paths", "labels", "boxes", "sizes", "difficult", "truth", "captions", "pixels")


def hash_order(ids: Sequence) -> np.ndarray:
    """A fixed shuffle: int64 (n,) indices in the order of the SHA-256 of each id.

    It depends on nothing but the ids: not on numpy's version, and the first 10 are among the first 20.
    """
    return np.array(
        sorted(range(len(ids)), key=lambda i: hashlib.sha256(str(ids[i]).encode()).digest()), np.int64
    )


class _Indexed:
    """What the three sets share: a length, parts by index, and `--limit`.

    `report`: what the rules for flawed data did, in lines, and `problems`, those of them that change what is scored.
    `skipped`: ids of unreadable images that were left out.
    """

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The set made of the images at `indices`, in that order, with a fingerprint of its own."""
        indices = np.asarray(indices, np.int64)
        part = {}
        for name in (f.name for f in fields(self) if f.name in PER_IMAGE):
            value = getattr(self, name)
            if value is not None:
                part[name] = value[indices] if isinstance(value, np.ndarray) else [value[i] for i in indices]
        return replace(
            self, **part, fingerprint=digest(self.fingerprint, "take", [str(i) for i in part["ids"]])
        )

    def subset(self, limit: int | None) -> Self:
        """The first `limit` images of a fixed shuffle (so classes are mixed), in the set's own order.

        `None`, or a limit that is not smaller than the set, gives the set itself. The limit is part of the
        fingerprint. Raises UserError when it is below 1.
        """
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise UserError(f"--limit {limit}: at least 1 image is needed")
        part = self.take(np.sort(hash_order(self.ids)[:limit]))
        return replace(part, fingerprint=digest(self.fingerprint, "limit", limit))

    def split(self, share: float, among: np.ndarray | None = None) -> tuple[Self, Self]:
        """(the rest, a `share` held out), each in the set's own order; either may be empty.

        By hash of the ids: the same for every seed. With `among`, bool (n,), the share is of those images alone.
        What was noted and left out of the set is told by the rest, once.
        """
        order = hash_order(self.ids)
        if among is not None:
            order = order[among[order]]
        chosen = np.sort(order[: round(share * len(order))])
        held_out = replace(self.take(chosen), report=[], problems=[], skipped=[])
        return self.take(np.setdiff1d(np.arange(len(self)), chosen)), held_out

    def without(self, bad: Sequence[int]) -> Self:
        """The set without the images at the indices `bad`, counted in `skipped` and the report."""
        if not len(bad):
            return self
        gone = [str(self.ids[i]) for i in bad]
        part = self.take(np.setdiff1d(np.arange(len(self)), bad))
        line = f"{len(gone)} × unreadable image: left out (first: {self.paths[bad[0]]})"
        return replace(part, report=[*self.report, line], skipped=[*self.skipped, *gone])


@dataclass
class ImageSet(_Indexed):
    """Images with one class each and, for localisation, boxes.

    `labels`: int64 (n,) indices into `classes`. `boxes`: None, or one float64 (k, 4) array an image with
    x0, y0, x1, y1 as shares of the width and height of the upright (EXIF-rotated) image. `pixels`: None, or
    uint8 (n, H, W, 3) of a set that is published as arrays (CIFAR); its `paths` then name the files they stand in.
    """

    name: str
    classes: list[str]
    ids: list[str]
    paths: list[Path]
    labels: np.ndarray
    boxes: list[np.ndarray] | None = None
    fingerprint: str = ""
    report: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    pixels: np.ndarray | None = None

    @property
    def boxed(self) -> np.ndarray:
        """bool (n,): whether an image has a box."""
        return np.array([len(boxes) > 0 for boxes in self.boxes or [()] * len(self)], bool)

    def read(self, index: int) -> np.ndarray:
        """One image, uint8 (H, W, 3) RGB. Raises UserError naming a file that cannot be decoded."""
        return read_rgb(self.paths[index]) if self.pixels is None else self.pixels[index]


class Truth(NamedTuple):
    """An image's objects as its file gives them, none moved and none dropped: what scores compare with.

    `boxes`: float64 (k, 4) x0, y0, x1, y1 as in `DetectionSet`, but they may leave the image, have no area, or run
    backwards. `labels`: int64 (k,). `difficult`: bool (k,), neither right nor wrong (COCO's crowd regions too).
    `repaired`: bool (k,), whether a rule clips or drops the object in training. `areas`: float64 (k,) as a COCO file
    says, None where the boxes' own are meant.
    """

    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    repaired: np.ndarray
    areas: np.ndarray | None = None


@dataclass
class DetectionSet(_Indexed):
    """Images with labelled boxes.

    `sizes`: int64 (n, 2) width, height of the frame the boxes live in (read an image with
    `read_rgb(path, frame=sizes[i])`). `boxes`: one float32 (k, 4) array an image, x0, y0, x1, y1 in pixels,
    continuous and half-open: a box that covers the whole image is 0, 0, width, height. `labels`: one int64
    (k,) array an image, indices into `classes` (no background class). `difficult`: one bool (k,) array. `categories`:
    the classes' ids in result files, None for 1, 2, 3 …

    `boxes`, `labels` and `difficult` are what is trained on and drawn: the readers' rules have clipped boxes or dropped
    them, counted in `report`. `truth`, one an image, is what scores compare with: every object as published (None:
    the same as `boxes`).
    """

    name: str
    classes: list[str]
    ids: list[str]
    paths: list[Path]
    sizes: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    difficult: list[np.ndarray]
    fingerprint: str = ""
    report: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    categories: list[int] | None = None
    truth: list[Truth] | None = None

    def to_score(self) -> Self:
        """The set as one that is scored: the report says of how many objects `truth` is not `boxes`."""
        repaired = sum(int(known.repaired.sum()) for known in self.truth or [])
        if not repaired:
            return self
        line = f"{repaired} × object that rules for boxes clip or drop: scored as published"
        return replace(self, report=[*self.report, line])

    def split(self, share: float, among: np.ndarray | None = None) -> tuple[Self, Self]:
        """As of every set; the part held out is one `to_score`."""
        rest, held_out = super().split(share, among)
        return rest, held_out.to_score()


@dataclass
class CaptionSet(_Indexed):
    """Images with one or more sentences each. `ids` are the integers of the COCO file."""

    name: str
    ids: list[int]
    paths: list[Path]
    captions: list[list[str]]
    fingerprint: str = ""
    report: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
