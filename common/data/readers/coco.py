"""Detection sets from JSON in COCO's instance format, beside a folder of images."""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json
from backbench.common.data.decode import read_headers
from backbench.common.data.layout import (
    Report,
    json_field,
    json_id,
    json_lists,
    need_folder,
    need_present,
    short_name,
)
from backbench.common.data.objects import Objects, finished_set
from backbench.common.data.overlap import note_of_both
from backbench.common.data.readers.coco_layout import PLAIN_NAMES, CocoLayout
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import DetectionSet

LAYOUT = (
    "train2017/, val2017/ (or one images/) and annotations/instances_train2017.json, instances_val2017.json"
)
SUFFIXES = ("2017", "2014", "")
NEGATIVE, EMPTY = "negative width or height", "no area (width or height 0)"


@dataclass
class Instances:
    """One instance file as it is, before any rule, in the order of the file.

    `ids`, `names`, `sizes` (width and height, or None), one an image. `categories`: name by category id, in the
    order of ids; ids are whole numbers of any size. Flat: `image` int64 (k,) index, `label` int64 (k,) index into
    `categories`, `box` float64 (k, 4) x, y, width, height in continuous pixels from 0, `area` float64 (k,) of the
    object (of the box where the file says none), `crowd` bool (k,), `number` int64 (k,) place in the file's list.
    """

    file: Path
    ids: list[int]
    names: list[str]
    sizes: list[list[float] | None]
    categories: dict[int, str]
    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    number: np.ndarray


def read_coco(spec: DataSpec) -> tuple[DetectionSet, DetectionSet]:
    """Read `coco:images=DIR,train=A.json,val=B.json` or `coco:DIR[,year=2017]` in COCO's layout as (train, test).

    `images=` is one folder for both, `train_images=` and `val_images=` are one each; below a DIR files are found
    by COCO's names. Classes: the categories of both files in the order of their ids, whatever gaps these have, or
    `classes=a+b`. Boxes are taken as they are: x, y, x + width, y + height, continuous, from 0. Crowd regions
    (iscrowd) are left out of training and difficult in the test set. Segmentations are not read. Boxes for another size
    of the image, as the file says it, are refused; `rescale=1` scales them to the image.
    Raises UserError for everything it cannot read.
    """
    root = need_folder(spec.path, LAYOUT) if spec.path else None
    files = CocoLayout(spec, root, "instances", SUFFIXES, LAYOUT)
    reports = [Report(), Report()]
    parts = [
        read_instances(files.annotation_file(part), report) for part, report in zip(("train", "val"), reports)
    ]
    folders = [files.image_folder(part, read.file) for part, read in zip(("train", "val"), parts)]
    category_of, given = _classes(spec, parts)
    default = root.resolve() if root else folders[0].resolve()
    if not root and default.name in PLAIN_NAMES:
        default = default.parent
    name = short_name(spec.options.get("name", default.name))
    train, test = (
        _build(name, *part, category_of, given, training=k == 0, rescale=spec.switch("rescale"))
        for k, part in enumerate(zip(parts, folders, reports))
    )
    return note_of_both(train, test)


def read_instances(file: Path, report: Report) -> Instances:
    """Read one instance file; no image is touched.

    An annotation of an unlisted image is dropped and noted, and so is a category of another's name that no annotation
    has. Raises UserError naming the entry for a doubled image id or category, an unlisted category, and a box of other
    than four finite numbers.
    """
    form = "COCO's instance format"
    images, annotations, listed = json_lists(
        read_json(file), ("images", "annotations", "categories"), file, form
    )
    categories = _categories(listed, annotations, file, report)
    label_of = {category: label for label, category in enumerate(categories)}
    index: dict[int, int] = {}
    names, sizes = [], []
    for number, image in enumerate(images):
        where = f"{file}: images[{number}]"
        key = json_field(image, "id", int, where)
        if key in index:
            raise UserError(f"{where}: image id {key} is doubled")
        index[key] = number
        names.append(json_field(image, "file_name", str, where))
        size = [image.get("width"), image.get("height")]
        sizes.append(size if all(map(_is_number, size)) else None)
    rows, values = [], []
    for number, item in enumerate(annotations):
        where = f"{file}: annotations[{number}]"
        owner = json_field(item, "image_id", int, where)
        category = json_field(item, "category_id", int, where)
        if category not in label_of:
            known = ", ".join(map(str, list(label_of)[:8]))
            more = " …" if len(label_of) > 8 else ""
            raise UserError(
                f"{where}: category {category} is not in 'categories' (ids {known}{more}); add it there"
            )
        x, y, w, h = _numbers(item.get("bbox"), where)
        if owner not in index:
            place = f"{file.name} annotations[{number}], image {owner}"
            report.note("annotation whose image is not listed: dropped", place)
            continue
        area = item.get("area", w * h)
        crowd = item.get("iscrowd", 0)
        if crowd not in (0, 1) or not _is_number(area):
            raise UserError(
                f"{where}: iscrowd is {crowd!r:.20}, area {area!r:.20}; expected 0 or 1, and a number"
            )
        rows.append((index[owner], label_of[category], number))
        values.append((x, y, w, h, area, crowd))
    image, label, number = np.array(rows, np.int64).reshape(-1, 3).T
    measured = np.array(values, np.float64).reshape(-1, 6)
    return Instances(
        *(file, list(index), names, sizes, categories),
        *(image, label, measured[:, :4], measured[:, 4], measured[:, 5].astype(bool), number),
    )


def _categories(listed: list[Any], annotations: list[Any], file: Path, report: Report) -> dict[int, str]:
    """Name by id, ordered by id. Of one name the annotated counts: some exporters add a root that no annotation has."""
    names: dict[int, str] = {}
    for number, item in enumerate(listed):
        where = f"{file}: categories[{number}]"
        key, name = json_field(item, "id", int, where), json_field(item, "name", str, where).strip()
        if key in names or not name:
            raise UserError(f"{where}: id {key}, name '{name}': the id is doubled or the name empty")
        names[key] = name
    names = dict(sorted(names.items()))
    used = {json_id(item.get("category_id")) for item in annotations if isinstance(item, dict)}
    for name, count in Counter(names.values()).items():
        if count == 1:
            continue
        same = [key for key in names if names[key] == name]
        annotated = [key for key in same if key in used]
        if len(annotated) > 1:
            raise UserError(
                f"{file}: categories {annotated[0]} and {annotated[1]} are both '{name}', and both have annotations; "
                "rename one, or give both one id"
            )
        kept = (annotated or same)[-1]
        for key in same:
            if key != kept:
                report.note(
                    f"category '{name}' without annotations, beside one of that name: left out", f"id {key}"
                )
                del names[key]
    return names


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _numbers(box: Any, where: str) -> list[float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise UserError(
            f"{where}: bbox is {str(box)[:60]}; expected [x, y, width, height], four finite numbers"
        )
    return box


def _classes(spec: DataSpec, parts: list[Instances]) -> tuple[dict[str, int], bool]:
    """Category id by class name, in the order of the classes, and whether they were given."""
    merged: dict[int, str] = {}
    for part in parts:
        for key, name in part.categories.items():
            if merged.setdefault(key, name) != name:
                raise UserError(
                    f"{part.file}: category {key} is '{name}', in {parts[0].file} '{merged[key]}'"
                )
    ids = {name: key for key, name in sorted(merged.items())}
    if len(ids) < len(merged):
        raise UserError(f"{parts[1].file}: a category has another id than in {parts[0].file}")
    if "classes" not in spec.options:
        return ids, False
    given = spec.options["classes"].split("+")
    if len(set(given)) < len(given) or "" in given:
        raise UserError(f"--data {spec}: classes= has an empty or a doubled name")
    if unknown := [name for name in given if name not in ids]:
        raise UserError(f"--data {spec}: no category '{unknown[0]}'; there are: {', '.join(ids)}")
    return {name: ids[name] for name in given}, True


def _build(
    name: str,
    read: Instances,
    folder: Path,
    report: Report,
    category_of: dict[str, int],
    given: bool,
    training: bool,
    rescale: bool,
) -> DetectionSet:
    def note(rule: str, fired: np.ndarray) -> None:
        if fired.any():
            first = f"{read.file.name} annotations[{read.number[int(np.argmax(fired))]}]"
            report.note(rule, first, int(fired.sum()))

    paths = [folder / each for each in read.names]
    need_present(read.file, "images", paths)
    classes = list(category_of)
    place = {key: label for label, key in enumerate(category_of.values())}
    label = np.array([place.get(key, -1) for key in read.categories], np.int64)[read.label]
    known = label >= 0
    if given:
        note("object of a class that classes= leaves out: dropped", ~known)
    if training:
        note("crowd region: left out of training", read.crowd & known)
    else:
        note("crowd region: difficult, neither right nor wrong", read.crowd & known)
    width, height = read.box[known, 2:].T
    negative = (width < 0) | (height < 0)
    bad = {
        NEGATIVE: negative,
        EMPTY: ((width == 0) | (height == 0)) & ~negative,
    }
    objects = Objects(
        read.image[known],
        label[known],
        np.hstack([read.box[known, :2], read.box[known, :2] + read.box[known, 2:]]),
        read.crowd[known],
        [f"{read.file.name} annotations[{number}]" for number in read.number[known].tolist()],
        bad,
        wrong=(NEGATIVE, EMPTY),
        left_out=read.crowd[known] if training else None,
        area=read.area[known],
    )
    made = finished_set(
        *(name, classes, read.ids, paths, read_headers(paths), read.sizes, objects),
        places=read.names,
        form="JSON",
        listed=read.file,
        annotations=[read.file],
        settings=["coco", classes, *(["rescaled"] if rescale else [])],
        report=report,
        rescale=rescale,
    )
    made = replace(made, categories=list(category_of.values()))
    return made if training else made.to_score()
