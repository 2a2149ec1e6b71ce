"""CUB-200-2011 as published: five text files beside images/."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.boxes import pixel_shares
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import Report, found, need_folder, need_present, read_lines, short_name
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import ImageSet

TABLES = ("classes", "images", "image_class_labels", "train_test_split", "bounding_boxes")
LAYOUT = "images/ and " + ", ".join(f"{name}.txt" for name in TABLES)


def read_cub(spec: DataSpec) -> tuple[ImageSet, ImageSet]:
    """Read `cub:CUB_200_2011` as (train, test), both with one box an image.

    Its boxes are x, y, width, height in pixels, x and y counted from 0: as shares x / W … (x + width) / W,
    W and H from the image's header. A box that reaches outside is clipped; one with no area leaves its image
    with an empty (0, 4) array. Both are in the report.
    """
    root = need_folder(spec.path, LAYOUT)
    if not (root / "images.txt").is_file() and (root / "CUB_200_2011").is_dir():
        root = root / "CUB_200_2011"
    missing = [f"{name}.txt" for name in TABLES if not (root / f"{name}.txt").is_file()]
    if missing:
        raise UserError(f"{root}: has no {', '.join(missing)} ({found(root)}); expected {LAYOUT}")
    classes = _table(root / "classes.txt", 1, str)
    names = _table(root / "images.txt", 1, str)
    labels = _same_keys(root, "image_class_labels", names, _table(root / "image_class_labels.txt", 1, int))
    training = _same_keys(root, "train_test_split", names, _table(root / "train_test_split.txt", 1, int))
    boxes = _same_keys(root, "bounding_boxes", names, _table(root / "bounding_boxes.txt", 4, float))
    position = {key: i for i, key in enumerate(classes)}
    for key in names:
        if labels[key] not in position:
            raise UserError(
                f"{root / 'image_class_labels.txt'}: image {key} is of class {labels[key]}, not listed"
            )
        if training[key] not in (0, 1):
            raise UserError(
                f"{root / 'train_test_split.txt'}: image {key} has {training[key]}, expected 0 or 1"
            )
    paths = [root / "images" / name for name in names.values()]
    need_present(root / "images.txt", "images", paths)
    whole = ImageSet(
        short_name(spec.options.get("name", root.resolve().name)),
        [name.partition(".")[2] or name for name in classes.values()],
        list(names.values()),
        paths,
        np.array([position[labels[key]] for key in names], np.int64),
        None,
        fingerprint(["cub"], list(names), paths, [root / f"{name}.txt" for name in TABLES]),
    )
    is_train = np.array([training[key] == 1 for key in names])
    pixels = np.array([boxes[key] for key in names], np.float64).reshape(-1, 4)
    return tuple(_part(whole, pixels, np.flatnonzero(mask), root) for mask in (is_train, ~is_train))


def _part(whole: ImageSet, pixels: np.ndarray, indices: np.ndarray, root: Path) -> ImageSet:
    if not len(indices):
        raise UserError(f"{root / 'train_test_split.txt'}: every image is in one part; expected 1 and 0")
    report = Report()
    part = whole.take(indices)
    x, y, w, h = pixels[indices].T
    corners = np.stack([x, y, x + w, y + h], axis=1)[:, None]
    boxes = pixel_shares(list(corners), part.paths, part.ids, report)
    return report.on(replace(part, boxes=boxes))


def _table(path: Path, columns: int, kind: Callable[[str], Any]) -> dict[int, Any]:
    """A text file of `id value…` lines: id to value (or list of values). UserError names file and line."""
    table: dict[int, Any] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line:
            continue
        # names may hold spaces, numbers not
        fields = line.split(maxsplit=1) if kind is str else line.split()
        try:
            if len(fields) != columns + 1:
                raise ValueError
            key, values = int(fields[0]), [kind(field) for field in fields[1:]]
            if kind is float and not np.isfinite(values).all():
                raise ValueError
        except ValueError:
            raise UserError(
                f"{path} line {number}: '{line[:60]}', expected an id and {columns} {kind.__name__}"
            ) from None
        if key in table:
            raise UserError(f"{path} line {number}: id {key} is doubled")
        table[key] = values if columns > 1 else values[0]
    if not table:
        raise UserError(f"{path}: is empty")
    return table


def _same_keys(root: Path, table: str, names: dict[int, str], values: dict[int, Any]) -> dict[int, Any]:
    lost = [key for key in names if key not in values]
    if lost:
        raise UserError(
            f"{root / table}.txt: {len(lost)} images of images.txt are missing (first: id {lost[0]})"
        )
    return values
