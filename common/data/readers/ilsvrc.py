"""ILSVRC's classification and localisation data: class folders; boxes as XML files or one of the public lists."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from backbench.common.base.cache import remember
from backbench.common.base.errors import UserError
from backbench.common.data.boxes import pixel_shares
from backbench.common.data.decode import threaded
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import (
    Report,
    class_names,
    files_below,
    found,
    list_folder,
    need_folder,
    read_lines,
    short_name,
)
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import ImageSet

LAYOUT = "train/<wnid>/<image> and val/<image> or val/<wnid>/<image>, also below [ILSVRC/]Data/CLS-LOC/"
BOXES = (
    "a folder of XML files (ILSVRC2012_bbox_val_v3), LOC_val_solution.csv (Kaggle), or localization.txt with "
    "class_labels.txt beside it (wsolevaluation)"
)
USUAL = ("LOC_{part}_solution.csv", "Annotations/CLS-LOC/{part}", "ILSVRC/Annotations/CLS-LOC/{part}")
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass
class Listed:
    """What a source of boxes says of one image: its class (a wnid, an index, or None) and boxes (k, 4) in pixels."""

    label: str | int | None
    boxes: list[list[float]]


def read_ilsvrc(spec: DataSpec, localise: bool = False) -> tuple[ImageSet, ImageSet]:
    """Read `ilsvrc:DIR[,boxes=FILE_OR_DIR][,train_boxes=FILE_OR_DIR]` as (train, test).

    Classes are the sorted folder names (wnids) under train/. The class of a validation image is its folder's name or,
    where val/ is flat as it was published, what the boxes say. Boxes are looked for where Kaggle puts them unless
    named. Corners are pixels as published, x0 / W … x1 / W with nothing added, W and H from the image's header; several
    boxes an image. With `localise` the test images are those with boxes. `train_boxes` only serve to choose a threshold
    and a centred box. Raises UserError for everything it cannot read.
    """
    given = need_folder(spec.path, LAYOUT)
    places = (given, given / "Data" / "CLS-LOC", given / "ILSVRC" / "Data" / "CLS-LOC")
    root = next((place for place in places if (place / "train").is_dir()), None)
    if root is None or not (root / "val").is_dir():
        raise UserError(
            f"{root or given}: has no {'val' if root else 'train'}/ ({found(given)}); expected {LAYOUT}"
        )
    reports = Report(), Report()
    classes = class_names(root / "train", LAYOUT, reports[0])
    name = short_name(spec.options.get("name", "ilsvrc"))
    sources = {part: _source(spec, given, part) for part in ("train", "val")}
    if sources["val"] is None and (localise or not _nested(root / "val")):
        raise UserError(f"--data {spec}: boxes are needed; add boxes= with {BOXES}")
    folders = [(root / "train" / wnid, label) for label, wnid in enumerate(classes)]
    train = class_images(name, classes, root, folders, reports[0])
    train = _boxed(train, sources["train"], reports[0])[0] if sources["train"] else train
    test = _validation(name, classes, root, sources["val"], localise, reports[1])
    return tuple(report.on(part) for part, report in zip((train, test), reports))


def class_images(
    name: str, classes: list[str], root: Path, folders: Iterable[tuple[Path, int]], report: Report
) -> ImageSet:
    """The images of folders, each with its label, in order of name. UserError for a folder without one."""
    paths, labels = [], []
    for folder, label in folders:
        images = list(files_below(folder, root, report)) if folder.is_dir() else []
        if not images:
            raise UserError(
                f"{folder}: no image there ({found(folder) if folder.is_dir() else 'no such folder'})"
            )
        paths += images
        labels += [label] * len(images)
    start = len(str(root / "_")) - 1
    ids = [str(path)[start:] for path in paths]
    key = fingerprint(["class folders", classes, labels], ids, paths, [])
    return ImageSet(name, classes, ids, paths, np.array(labels, np.int64), None, key)


def _nested(folder: Path) -> bool:
    return bool(list_folder(folder, folder, Report())[1])


def _validation(
    name: str, classes: list[str], root: Path, source: Path | None, localise: bool, report: Report
) -> ImageSet:
    folder = root / "val"
    nested = _nested(folder)
    if nested:
        wnids = class_names(folder, LAYOUT, report)
        unknown = sorted(set(wnids) - set(classes))
        if unknown:
            raise UserError(f"{folder / unknown[0]}: '{unknown[0]}' is no folder of {root / 'train'}")
        folders = [(folder / wnid, classes.index(wnid)) for wnid in wnids]
    else:
        folders = [(folder, 0)]
    images = class_images(name, classes, root, folders, report)
    if source is None:
        return images
    images, said = _boxed(images, source, report)
    listed = np.array([entry is not None and len(entry.boxes) > 0 for entry in said])
    if not nested:
        images = replace(images, labels=_labels(images, said, classes, source, report))
        known = np.flatnonzero(images.labels >= 0)
        images, listed = images.take(known), listed[known]
    if not images.boxed.any():
        raise UserError(f"{source}: none of the {len(images)} images of {folder} has a box there")
    if localise and not listed.all():
        first = images.ids[int(np.argmin(listed))]
        report.note("validation image without a box: not scored", first, int((~listed).sum()))
        images = images.take(np.flatnonzero(listed))
    return images


def _labels(
    images: ImageSet, said: list[Listed | None], classes: list[str], source: Path, report: Report
) -> np.ndarray:
    """Labels from a source of boxes; −1 where it does not know the image."""
    index = {wnid: label for label, wnid in enumerate(classes)}
    labels = np.full(len(images), -1)
    for i, entry in enumerate(said):
        if entry is None:
            report.note("validation image of unknown class: left out", images.ids[i])
            continue
        label = entry.label if isinstance(entry.label, int) else index.get(entry.label)
        if label is None or not 0 <= label < len(classes):
            raise UserError(
                f"{source}: {images.ids[i]} is of class {entry.label}, which train/ does not have"
            )
        labels[i] = label
    return labels


def _boxed(images: ImageSet, source: Path, report: Report) -> tuple[ImageSet, list[Listed | None]]:
    """The set with the boxes of a source, and what the source says of each image."""
    listed, files = _read_source(source)
    by_stem: dict[str, list[str]] = {}
    for key in listed:
        by_stem.setdefault(key.rpartition("/")[2], []).append(key)
    said = []
    for name in images.ids:
        key = PurePosixPath(name).with_suffix("").as_posix()
        alike = by_stem.get(key.rpartition("/")[2], [])
        said.append(listed.get(key) or (listed[alike[0]] if len(alike) == 1 else None))
    lost = len(listed) - sum(entry is not None for entry in said)
    if lost:
        report.note("image of the box list that is not there: ignored", source.name, lost)
    pixels = [np.array(entry.boxes if entry else [], np.float64).reshape(-1, 4) for entry in said]
    boxes = pixel_shares(pixels, images.paths, images.ids, report)
    key = fingerprint(images.fingerprint, images.ids, images.paths, files)
    return replace(images, boxes=boxes, fingerprint=key), said


def _source(spec: DataSpec, given: Path, part: str) -> Path | None:
    option = "boxes" if part == "val" else "train_boxes"
    if option in spec.options:
        named = Path(spec.options[option])
        named = named if named.exists() or not (given / named).exists() else given / named
        if not named.exists():
            raise UserError(f"{named}: no such file or folder; {option}= is {BOXES}")
        return named
    usual = [given / place.format(part=part) for place in USUAL] if part == "val" else []
    return next((place for place in usual if place.exists()), None)


def _read_source(source: Path) -> tuple[dict[str, Listed], list[Path]]:
    """Boxes by image path without its ending, and the files that they came from."""
    if source.is_dir():
        files = sorted(files_below(source, source, Report(), (".xml",)))
        if not files:
            raise UserError(f"{source}: holds no .xml file ({found(source)}); expected {BOXES}")
        read = remember("ilsvrc xml 1", files, lambda: threaded(_read_xml, files, desc="reading boxes"))
        return {path.stem: Listed(label, boxes) for path, (label, boxes) in zip(files, read)}, files
    lines = read_lines(source)
    if lines and lines[0].replace(" ", "") == "ImageId,PredictionString":
        return _read_solution(source, lines), [source]
    labels = source.with_name("class_labels.txt")
    listed = _read_localization(source, lines)
    if not labels.is_file():
        return listed, [source]
    for number, row in enumerate(csv.reader(read_lines(labels)), 1):
        if len(row) != 2 or not row[1].strip().isdecimal():
            raise UserError(f"{labels} line {number}: '{','.join(row)[:60]}', expected path,class index")
        entry = listed.get(_key(row[0]))
        if entry is not None:
            entry.label = int(row[1])
    return listed, [source, labels]


def _key(name: str) -> str:
    return PurePosixPath(name.strip()).with_suffix("").as_posix()


def _read_solution(source: Path, lines: list[str]) -> dict[str, Listed]:
    """Kaggle's list: `ImageId,PredictionString`, the latter `wnid x0 y0 x1 y1` again and again."""
    listed = {}
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        name, _, text = line.partition(",")
        fields = text.split()
        where = f"{source} line {number}"
        if not fields or len(fields) % 5:
            raise UserError(f"{where}: '{line[:60]}', expected an image and groups of wnid x0 y0 x1 y1")
        boxes = [_numbers(fields[k + 1 : k + 5], where) for k in range(0, len(fields), 5)]
        listed[_key(name)] = Listed(fields[0], boxes)
    return listed


def _read_localization(source: Path, lines: list[str]) -> dict[str, Listed]:
    """wsolevaluation's list: rows `path,x0,y0,x1,y1` in pixels, several an image, no header."""
    listed: dict[str, Listed] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split(",")
        if not line:
            continue
        if len(fields) != 5:
            raise UserError(f"{source} line {number}: '{line[:60]}' is none of {BOXES}")
        box = _numbers(fields[1:], f"{source} line {number}")
        listed.setdefault(_key(fields[0]), Listed(None, [])).boxes.append(box)
    return listed


def _numbers(texts: Iterable[str], where: str) -> list[float]:
    try:
        values = [float(text) for text in texts]
        if not np.isfinite(values).all():
            raise ValueError
    except ValueError:
        raise UserError(f"{where}: a box is four numbers in pixels, found '{' '.join(texts)[:60]}'") from None
    return values


def _read_xml(path: Path) -> list:
    """[class of the first object or None, boxes] of one annotation."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        boxes = [_numbers([o.findtext(f"bndbox/{c}") or "" for c in CORNERS], str(path)) for o in objects]
    except (ElementTree.ParseError, OSError) as error:
        raise UserError(f"{path}: not a readable XML file ({error})") from None
    return [objects[0].findtext("name") if objects else None, boxes]
