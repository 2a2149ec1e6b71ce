"""Image folders: DIR/train/<class>/image and DIR/val/<class>/image, boxes in a list."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.boxes import read_box_csv
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import Report, class_names, files_below, found, need_folder, short_name
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import ImageSet

LAYOUT = "DIR/train/<class>/<image> and DIR/val/<class>/<image>"


def read_folder(spec: DataSpec, localise: bool = False) -> tuple[ImageSet, ImageSet]:
    """Read `folder:DIR[,train=][,val=][,boxes=FILE][,boxes_split=val|all][,exclude_boxed=1]`.

    Returns (train, test). Classes are the sorted folder names under train/. To classify, the test set is all
    of val/. With `localise` it is the images that have boxes: those of val/ (`boxes_split=val`, the default
    where there are any) or of both folders (`all`). An image both in training and scored is refused.
    `exclude_boxed=1` takes the boxed images of train/ out of training (pretrain with it too), and makes `all`
    the default.
    """
    root = need_folder(spec.path, LAYOUT)
    parts = {part: spec.options.get(part, part) for part in ("train", "val")}
    for part, folder in parts.items():
        if (
            Path(folder).is_absolute()
            or ".." in Path(folder).parts
            or folder == parts["train"] == parts["val"]
        ):
            raise UserError(f"--data {spec}: {part}={folder}; train= and val= are two folders below {root}")
        if not (root / folder).is_dir():
            raise UserError(
                f"{root}: has no {folder}/ folder ({found(root)}); expected {LAYOUT}, or name it with {part}="
            )
    reports = {"train": Report(), "val": Report()}
    classes = class_names(root / parts["train"], LAYOUT, reports["train"])
    train = _read_part(root, parts["train"], classes, spec, reports["train"])
    unknown = set(class_names(root / parts["val"], LAYOUT, reports["val"])) - set(classes)
    if unknown:
        first = sorted(unknown)[0]
        raise UserError(
            f"{root / parts['val'] / first}: class '{first}' is not among the {len(classes)} classes of "
            f"{root / parts['train']} ({', '.join(classes[:8])}{', …' if len(classes) > 8 else ''})"
        )
    test = _read_part(root, parts["val"], classes, spec, reports["val"])
    if "boxes" in spec.options:
        train, test = _with_boxes(root, spec, train, test, localise, reports)
    elif localise:
        raise UserError(
            f"--data {spec}: localisation needs boxes; add boxes=FILE (path,x0,y0,x1,y1 in shares)"
        )
    elif {"exclude_boxed", "boxes_split"} & set(spec.options):
        raise UserError(f"--data {spec}: exclude_boxed and boxes_split need boxes=FILE")
    return reports["train"].on(train), reports["val"].on(test)


def _read_part(root: Path, part: str, classes: list[str], spec: DataSpec, report: Report) -> ImageSet:
    paths, labels = [], []
    for label, name in enumerate(classes):
        if not (root / part / name).is_dir():
            report.note("class of the training folder without test images", f"{part}/{name}")
            continue
        images = list(files_below(root / part / name, root, report))
        if not images:
            folder = root / part / name
            raise UserError(f"{folder}: class folder with no image ({found(folder)}); fill it or remove it")
        paths += images
        labels += [label] * len(images)
    # cut, because Path.relative_to takes ten seconds on a million files
    start = len(str(root / "_")) - 1
    ids = [str(path)[start:] for path in paths]
    key = fingerprint(["folder", classes], ids, paths, [])
    name = short_name(spec.options.get("name", root.resolve().name))
    return ImageSet(name, classes, ids, paths, np.array(labels, np.int64), None, key)


def _with_boxes(
    root: Path, spec: DataSpec, train: ImageSet, test: ImageSet, localise: bool, reports: dict[str, Report]
) -> tuple[ImageSet, ImageSet]:
    listed = Path(spec.options["boxes"])
    if not listed.exists() and (root / listed).exists():
        listed = root / listed
    boxes = read_box_csv(listed, reports["val"])
    absent = [key for key in boxes if not (root / key).is_file()]
    if absent:
        raise UserError(
            f"{listed}: {len(absent)} of {len(boxes)} images listed there are absent from {root} "
            f"(first: {absent[0]})"
        )
    known = set(train.ids) | set(test.ids)
    elsewhere = [key for key in boxes if key not in known]
    if elsewhere:
        reports["val"].note("boxed image in neither folder: ignored", elsewhere[0], len(elsewhere))
    exclude = _switch(spec, "exclude_boxed")
    in_train = np.array([key in boxes for key in train.ids])
    in_test = np.array([key in boxes for key in test.ids])
    kept = train
    if exclude and in_train.any():
        first = train.ids[np.flatnonzero(in_train)[0]]
        reports["train"].note("boxed image: left out of training", first, int(in_train.sum()))
        kept = _need_images(
            train.take(np.flatnonzero(~in_train)), f"{listed}: every training image has boxes"
        )
    if not localise:
        return kept, test
    split = spec.options.get("boxes_split", "val" if in_test.any() and not exclude else "all")
    if split not in ("val", "all"):
        raise UserError(f"--data {spec}: boxes_split={split} is unknown; write val or all")
    if split == "all" and in_train.any() and not exclude:
        remedy = (
            f"boxes_split=val (score only the {in_test.sum()} boxed images of val), or "
            if in_test.any()
            else ""
        )
        raise UserError(
            f"{listed}: {in_train.sum()} boxed images are training images too (first: "
            f"{train.ids[np.flatnonzero(in_train)[0]]}), so scores would be of images seen in training; "
            f"add {remedy}exclude_boxed=1 (leave them out of training; pretrain with it too)"
        )
    if split == "val" and in_train.any() and not exclude:
        first = train.ids[np.flatnonzero(in_train)[0]]
        reports["val"].note("boxed image of the training folder: not scored", first, int(in_train.sum()))
    if not in_test.all():
        first = test.ids[np.flatnonzero(~in_test)[0]]
        reports["val"].note("image of val without a box: not scored", first, int((~in_test).sum()))
    scored = test.take(np.flatnonzero(in_test))
    if split == "all":
        scored = _join(train.take(np.flatnonzero(in_train)), scored)
    _need_images(scored, f"{listed}: no image of val has a box")
    return _boxed(kept, boxes, listed) if in_train.any() and not exclude else kept, _boxed(
        scored, boxes, listed
    )


def _boxed(images: ImageSet, boxes: dict[str, np.ndarray], listed: Path) -> ImageSet:
    """The set with the boxes that the list has for it, (0, 4) where it has none."""
    key = fingerprint(images.fingerprint, images.ids, images.paths, [listed])
    return replace(images, boxes=[boxes.get(key, np.zeros((0, 4))) for key in images.ids], fingerprint=key)


def _switch(spec: DataSpec, key: str) -> bool:
    value = spec.options.get(key, "0")
    if value not in ("0", "1"):
        raise UserError(f"--data {spec}: {key}={value}; write {key}=1 or {key}=0")
    return value == "1"


def _need_images(part: ImageSet, otherwise: str) -> ImageSet:
    if not len(part):
        raise UserError(f"{otherwise}; nothing is left")
    return part


def _join(first: ImageSet, second: ImageSet) -> ImageSet:
    return replace(
        first,
        ids=first.ids + second.ids,
        paths=first.paths + second.paths,
        labels=np.concatenate([first.labels, second.labels]),
        fingerprint=first.fingerprint + second.fingerprint,
    )
