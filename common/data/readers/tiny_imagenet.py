"""Tiny-ImageNet-200 as published: 64 × 64 images of 200 classes, one box each."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.boxes import pixel_shares
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import Report, class_names, found, need_folder, read_lines, short_name
from backbench.common.data.readers.ilsvrc import class_images
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import ImageSet

LAYOUT = "train/<wnid>/images/, train/<wnid>/<wnid>_boxes.txt, val/images/ and val/val_annotations.txt"


def read_tiny_imagenet(spec: DataSpec) -> tuple[ImageSet, ImageSet]:
    """Read `tiny_imagenet:tiny-imagenet-200` as (train, test): its train/ and its val/; its test/ has no labels.

    Box corners are pixels counted from 0 that belong to the box (the whole image is 0, 0, 63, 63): half-open,
    x0 / W, y0 / H, (x1 + 1) / W, (y1 + 1) / H. Raises UserError for everything it cannot read.
    """
    root = need_folder(spec.path, LAYOUT)
    if not (root / "train").is_dir() and (root / "tiny-imagenet-200").is_dir():
        root = root / "tiny-imagenet-200"
    annotations = root / "val" / "val_annotations.txt"
    if not (root / "train").is_dir() or not annotations.is_file():
        raise UserError(f"{root}: is not Tiny-ImageNet ({found(root)}); expected {LAYOUT}")
    name, reports = short_name(spec.options.get("name", root.resolve().name)), (Report(), Report())
    classes = class_names(root / "train", LAYOUT, reports[0])
    folders = [(root / "train" / wnid / "images", label) for label, wnid in enumerate(classes)]
    train = class_images(name, classes, root, folders, reports[0])
    lists = [root / "train" / wnid / f"{wnid}_boxes.txt" for wnid in classes]
    boxes = {key: box for path in lists for key, (_, box) in _table(path, 4).items()}
    train = _boxed(train, boxes, lists, reports[0])
    test = class_images(name, classes, root, [(root / "val" / "images", 0)], reports[1])
    said = _table(annotations, 5)
    index = {wnid: label for label, wnid in enumerate(classes)}
    labels = []
    for path in test.paths:
        if path.name not in said:
            raise UserError(f"{annotations}: has no line for {path.name}, which is in val/images/")
        wnid = said[path.name][0]
        if wnid not in index:
            raise UserError(f"{annotations}: {path.name} is of class '{wnid}', which train/ does not have")
        labels.append(index[wnid])
    test = replace(test, labels=np.array(labels, np.int64))
    test = _boxed(test, {key: box for key, (_, box) in said.items()}, [annotations], reports[1])
    return tuple(report.on(part) for part, report in zip((train, test), reports))


def _boxed(images: ImageSet, boxes: dict[str, list[int]], files: list[Path], report: Report) -> ImageSet:
    absent = [path for path in images.paths if path.name not in boxes]
    if absent:
        report.note("image without a box", absent[0].name, len(absent))
    pixels = [
        np.array([boxes[path.name]] if path.name in boxes else [], np.float64).reshape(-1, 4) + (0, 0, 1, 1)
        for path in images.paths
    ]
    key = fingerprint(images.fingerprint, images.ids, images.paths, files)
    return replace(images, boxes=pixel_shares(pixels, images.paths, images.ids, report), fingerprint=key)


def _table(path: Path, values: int) -> dict[str, tuple[str, list[int]]]:
    """`name [wnid] x0 y0 x1 y1`, by name: the text before the box, and the box. UserError names file and line."""
    table = {}
    for number, line in enumerate(read_lines(path), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            if len(fields) != values + 1:
                raise ValueError
            table[fields[0]] = fields[1], [int(field) for field in fields[-4:]]
        except ValueError:
            form = "an image, its class" if values == 5 else "an image"
            raise UserError(f"{path} line {number}: '{line[:60]}', expected {form} and x0 y0 x1 y1") from None
    return table
