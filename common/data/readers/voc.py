"""Detection sets in PASCAL VOC's layout: one year, several years, or any folder of that shape."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from backbench.common.base.cache import remember
from backbench.common.base.errors import UserError
from backbench.common.data.decode import read_headers, threaded
from backbench.common.data.layout import (
    Report,
    files_below,
    found,
    need_folder,
    need_present,
    read_lines,
    short_name,
)
from backbench.common.data.objects import Objects, finished_set, frames, scales
from backbench.common.data.overlap import note_of_both
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import DetectionSet

# fmt: off
VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# fmt: on
LAYOUT = "VOC2007/ or VOC2012/, or JPEGImages/, Annotations/ and ImageSets/Main/"
CORNERS = ("xmin", "ymin", "xmax", "ymax")
SWAPPED = "xmin > xmax or ymin > ymax"
FLAGGED = re.compile(r"(.*\S)\s+(?:-1|0|1)")  # a name, which may hold spaces, in the list of one class


def read_voc(spec: DataSpec) -> tuple[DetectionSet, DetectionSet]:
    """Read `voc:DIR[,year=2007+2012][,train=trainval][,test=test][,classes=a+b][,rescale=1]` as (train, test).

    DIR is a VOCdevkit with years, or one folder of that shape. With VOC2007 and VOC2012 and no `year`, the
    07+12 protocol: both years' trainval train, VOC2007's test alone tests (Faster R-CNN, SSD). Classes: `classes=`,
    else VOC's 20 in their order when no other name occurs, else the names found, sorted.

    Boxes: VOC's corners are 1-based and inclusive, so x0 = xmin − 1, y0 = ymin − 1, x1 = xmax, y1 = ymax is
    the half-open box in continuous pixels. Boxes that reach outside are clipped, boxes wholly outside
    or without area (xmin ≥ xmax) dropped, for training and drawing: all are in `truth`, what was done is in the report.
    Boxes for another size of the image, as its XML says it, are refused; `rescale=1` scales them to the image.
    Raises UserError for everything it cannot read.
    """
    years = _years(spec)
    train_split, test_split = spec.options.get("train", "trainval"), spec.options.get("test", "test")
    train_raw = _read_split(years, train_split)
    test_raw = _read_split(_tested(years, test_split), test_split)
    given = spec.options["classes"].split("+") if "classes" in spec.options else None
    if given and (len(set(given)) < len(given) or "" in given):
        raise UserError(f"--data {spec}: classes= has an empty or a doubled name")
    classes = given or _discover([train_raw, test_raw])
    name, rescale = short_name(spec.options.get("name") or _default_name(years)), spec.switch("rescale")
    train, test = (_build(name, raw, classes, given, rescale) for raw in (train_raw, test_raw))
    test = test.to_score()
    return note_of_both(train, test)


def _tested(years: list[Path], split: str) -> list[Path]:
    """The years whose `split` is scored: VOC2012's test is published without annotations."""
    return [y for y in years if y.name == "VOC2007"] if _is_0712(years) and split == "test" else years


def _is_0712(years: list[Path]) -> bool:
    return {"VOC2007", "VOC2012"} <= {year.name for year in years}


def _years(spec: DataSpec) -> list[Path]:
    root = need_folder(spec.path, LAYOUT)
    if not any(root.glob("VOC[0-9]*")) and (root / "VOCdevkit").is_dir():
        root = root / "VOCdevkit"
    if (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir():
        if "year" in spec.options and root.resolve().name != f"VOC{spec.options['year']}":
            raise UserError(f"{root}: year= is for a VOCdevkit, and this is one folder; leave it out")
        return [root]
    years = sorted(path for path in root.glob("VOC[0-9][0-9][0-9][0-9]") if path.is_dir())
    if not years:
        raise UserError(f"{root}: not a VOC layout ({found(root)}); expected {LAYOUT}")
    if "year" in spec.options:
        wanted = spec.options["year"].split("+")
        for year in wanted:
            if root / f"VOC{year}" not in years:
                raise UserError(f"{root}: has no VOC{year}/ ({found(root)}); year= takes years joined by +")
        years = [root / f"VOC{year}" for year in wanted]
    elif len(years) > 1:
        if not _is_0712(years):
            raise UserError(
                f"{root}: several years ({found(root)}); say which, as in year={years[0].name[3:]}"
            )
        years = [root / "VOC2007", root / "VOC2012"]
    for year in years:
        for part in ("JPEGImages", "Annotations"):
            need_folder(year / part, LAYOUT)
    return years


def _default_name(years: list[Path]) -> str:
    if len(years) > 1:
        return "voc" + "".join(year.name[5:] for year in years)
    return years[0].resolve().name.replace("VOC", "voc")


@dataclass
class _Raw:
    """A split as read: `records[i]` is what `_parse` gave for image i, before any rule."""

    ids: list[str]
    images: list[Path]
    annotations: list[Path]
    records: list[dict]
    headers: np.ndarray
    lists: list[Path]
    report: Report


def _read_split(years: list[Path], split: str, need_images: bool = True) -> _Raw:
    """A split of every year. Unless `need_images` an image may be absent; its header is 0, 0, 0 then."""
    report = Report()
    ids, images, annotations, lists, there = [], [], [], [], []
    for year in years:
        listed = year / "ImageSets" / "Main" / f"{split}.txt"
        by_name = _image_files(year / "JPEGImages")
        names = _split_names(year, listed, split, report)
        files = [by_name.get(name, [year / "JPEGImages" / f"{name}.jpg"])[0] for name in names]
        for name in names:
            if len(by_name.get(name, ())) > 1:
                report.note("image in several files: the first taken", by_name[name][0].name)
        xmls = _annotation_files(year, names)
        if need_images:
            need_present(listed, "images", files)
        need_present(listed, "annotations", xmls)
        prefix = f"{year.name}/" if set(names) & set(ids) else ""
        ids += [prefix + name for name in names]
        there += [name in by_name for name in names]
        images, annotations, lists = images + files, annotations + xmls, [*lists, listed]
    headers = np.zeros((len(images), 3), np.int64)
    headers[there] = read_headers([path for path, known in zip(images, there) if known])
    return _Raw(ids, images, annotations, _records(annotations), headers, lists, report)


def _annotation_files(year: Path, names: list[str]) -> list[Path]:
    return [year / "Annotations" / f"{name}.xml" for name in names]


def _records(xmls: list[Path]) -> list[dict]:
    return remember("voc 1", xmls, lambda: threaded(_parse, xmls, desc="reading annotations"))


@dataclass
class Published:
    """The objects of a split as its files give them, none clipped and none dropped; the images need not be there.

    `ids` are the images'. Flat: `image` int64 (k,) index, `names` the classes, `box` float64 (k, 4) x0, y0, x1, y1 as
    in `read_voc`, `difficult` bool (k,). `report` says what is odd.
    """

    ids: list[str]
    image: np.ndarray
    names: list[str]
    box: np.ndarray
    difficult: np.ndarray
    report: list[str]


def read_published(spec: DataSpec, split: str) -> Published:
    """Read one split of `voc:DIR[,year=…][,rescale=1]` as evaluators do. Raises UserError as `read_voc` does.

    Boxes for another size of the image are left in its XML's pixels, which is noted, unless `rescale=1`.
    """
    raw = _read_split(_tested(_years(spec), split), split, need_images=False)
    rows = [(i, *item) for i, record in enumerate(raw.records) for item in record["objects"]]
    places = [path.name for path in raw.annotations]
    box = np.array([corners for _, _, _, *corners in rows], np.float64).reshape(-1, 4) - [1, 1, 0, 0]
    image, unknown = (
        np.array([row[0] for row in rows], np.int64),
        np.array([row[2] is None for row in rows], bool),
    )
    difficult = np.array([bool(row[2]) for row in rows], bool)
    flat = Objects(image, np.zeros(len(rows), np.int64), box, difficult, [], {})
    factors = _factors(raw, places, flat)[image]
    apart = (factors != 1).any(1)
    if spec.switch("rescale"):
        flat.box = box * np.tile(factors, 2)
    for rule, fired in (
        ("object without <difficult>: taken as not difficult", unknown),
        (f"box with {SWAPPED}: counts, and nothing matches it", (box[:, 2:] <= box[:, :2]).any(1)),
        (
            "box for another size of the image than it has: "
            + ("rescaled to the image's" if spec.switch("rescale") else "scored in the XML's pixels"),
            apart,
        ),
    ):
        if fired.any():
            raw.report.note(rule, places[image[fired.argmax()]], int(fired.sum()))
    return Published(raw.ids, image, [row[1] for row in rows], flat.box, difficult, raw.report.lines())


def _factors(raw: _Raw, places: list[str], found: Objects) -> np.ndarray:
    """What boxes for another size of the image are to be multiplied by, 1 elsewhere: float64 (n, 2)."""
    said = [
        size if size and all(side > 0 for side in size) else None
        for record in raw.records
        for size in [record["size"]]
    ]
    sizes = frames(raw.headers, said, places, Report(), "XML")
    return scales(sizes, said, places, raw.images, found, Report(), "XML", rescale=True)


def split_classes(spec: DataSpec, split: str) -> set[str] | None:
    """The classes that a split has objects of, in any year; None where no year has such a split."""
    names, there = set(), False
    for year in _years(spec):
        listed = year / "ImageSets" / "Main" / f"{split}.txt"
        if listed.is_file():
            there = True
            listed_names = _split_names(year, listed, split, Report())
            xmls = [
                xml for xml in _annotation_files(year, listed_names) if xml.is_file()
            ]  # VOC2012's test has none
            names |= {item[0] for record in _records(xmls) for item in record["objects"]}
    return names if there else None


def _image_files(folder: Path) -> dict[str, list[Path]]:
    """Image files by the name that split files call them, below `folder` and without ending: `a`, `part/b`."""
    files: dict[str, list[Path]] = {}
    for path in files_below(folder, folder, Report()):
        files.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return files


def _split_names(year: Path, listed: Path, split: str, report: Report) -> list[str]:
    if not listed.is_file():
        there = sorted(path.stem for path in listed.parent.glob("*.txt") if "_" not in path.stem)
        raise UserError(
            f"{listed}: no such split '{split}'; {listed.parent} has: {', '.join(there) or 'no .txt file'} "
            "(choose with train= and test=, in detection/evaluate.py with --split)"
        )
    names: dict[str, None] = {}
    for number, line in enumerate(read_lines(listed), 1):
        if not line:
            continue
        flagged = FLAGGED.fullmatch(line)
        name = flagged[1] if flagged and not (year / "Annotations" / f"{line}.xml").exists() else line
        if name in names:
            report.note("image listed twice: taken once", f"{listed.name} line {number}")
        names[name] = None
    if not names:
        raise UserError(f"{listed}: lists no image")
    return list(names)


def _parse(path: Path) -> dict:
    """One XML as {"size": [w, h] or None, "objects": [[name, difficult or None, *corners], …]}."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        line, column = error.position
        reason = str(error).partition(":")[0]
        raise UserError(f"{path} line {line}, column {column}: malformed XML ({reason}); repair it") from None
    except (OSError, UnicodeError, ValueError, LookupError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if root.tag != "annotation":
        raise UserError(f"{path}: the root element is <{root.tag}>, expected <annotation>")
    size = root.find("size")
    if size is not None:
        size = [_number(size, key, f"{path}: <size>") for key in ("width", "height")]
    objects = []
    for number, item in enumerate(root.findall("object"), 1):
        where = f"{path}: object {number}"
        name = (item.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{where} has no <name>")
        box = item.find("bndbox")
        if box is None:
            raise UserError(f"{where} ({name}) has no <bndbox>")
        difficult = (item.findtext("difficult") or "").strip() or None
        if difficult not in (None, "0", "1"):
            raise UserError(f"{where} ({name}): <difficult> is '{difficult}', expected 0 or 1")
        corners = [_number(box, key, f"{where} ({name})") for key in CORNERS]
        objects.append([name, difficult and int(difficult), *corners])
    return {"size": size, "objects": objects}


def _number(parent: ElementTree.Element, key: str, where: str) -> float:
    text = parent.findtext(key)
    if text is None:
        raise UserError(f"{where} has no <{key}>")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: <{key}> is '{text.strip()}', not a number")
    return value


def _discover(splits: list[_Raw]) -> list[str]:
    names = {item[0] for raw in splits for record in raw.records for item in record["objects"]}
    if not names:
        raise UserError(f"{splits[0].annotations[0].parent}: no annotation holds an object")
    return list(VOC_CLASSES) if names <= set(VOC_CLASSES) else sorted(names)


def _build(name: str, raw: _Raw, classes: list[str], given: list[str] | None, rescale: bool) -> DetectionSet:
    index = {label: i for i, label in enumerate(classes)}
    owner, where, corners, labels, difficult = [], [], [], [], []
    for i, record in enumerate(raw.records):
        for number, (label, hard, *box) in enumerate(record["objects"], 1):
            place = f"{raw.annotations[i].name} object {number}"
            if label not in index:
                raise UserError(
                    f"{raw.annotations[i]}: object {number} is of class '{label}', not in {given}; "
                    "add it to classes=, or leave that out"
                )
            if hard is None:
                raw.report.note("object without <difficult>: taken as not difficult", place)
            owner.append(i)
            where.append(place)
            corners.append(box)
            labels.append(index[label])
            difficult.append(bool(hard))
    corner = np.array(corners, np.float64).reshape(-1, 4)
    low, high = corner[:, :2], corner[:, 2:]
    swapped = (low > high).any(1)
    bad = {
        SWAPPED: swapped,
        "no area (xmin = xmax or ymin = ymax)": (low == high).any(1) & ~swapped,
    }
    objects = Objects(
        np.array(owner, np.int64),
        np.array(labels, np.int64),
        np.hstack([low - 1, high]),
        np.array(difficult, bool),
        where,
        bad,
        wrong=(SWAPPED,),
    )
    return finished_set(
        *(
            name,
            classes,
            raw.ids,
            raw.images,
            raw.headers,
            [record["size"] for record in raw.records],
            objects,
        ),
        places=[path.name for path in raw.annotations],
        form="XML",
        listed=raw.lists[0],
        annotations=[*raw.lists, *raw.annotations],
        settings=["voc", classes, *(["rescaled"] if rescale else [])],
        report=raw.report,
        rescale=rescale,
        slack=1.0,
    )
