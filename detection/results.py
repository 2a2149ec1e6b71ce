"""Result files: COCO result JSON, in which a run keeps its detections, and VOC's text files, one a class."""

import json
import sys
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from string import digits

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_text
from backbench.common.data.layout import found, is_data, json_id, read_lines
from backbench.common.metrics.average_precision import Boxes

FORM = '{"image_id", "category_id", "bbox": [x, y, width, height], "score"}'


def write_results(path: Path, found: Boxes, ids: Sequence, categories: Sequence[int] | None = None) -> None:
    """Write COCO result JSON, one detection a line; `category_id` is 1 + the class's index, or that of `categories`.

    Boxes are rounded to .01 pixel, scores to six decimals; equal detections give equal bytes.
    """
    low, high = found.box[:, :2], found.box[:, 2:]
    boxes = np.round(np.hstack([low, high - low]).astype(np.float64), 2).tolist()
    scores = np.round(found.score.astype(np.float64), 6).tolist()
    names = [json.dumps(i if isinstance(i, int) else str(i)) for i in ids]
    numbers = [c + 1 if categories is None else categories[c] for c in found.label.tolist()]
    lines = [
        f'{{"image_id":{names[i]},"category_id":{category},"bbox":[{x},{y},{w},{h}],"score":{score}}}'
        for i, category, (x, y, w, h), score in zip(found.image.tolist(), numbers, boxes, scores)
    ]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_results(path: Path, ids: Sequence, classes: int, categories: Sequence[int] | None = None) -> Boxes:
    """Read COCO result JSON, in its order. Boxes become x0, y0, x1, y1.

    `categories` are the classes' category ids, 1 to `classes` where they are not given. An `image_id` may also be
    the number that the id's digits spell. Raises UserError naming the entry for an unknown image or category, a box of
    other than four finite numbers, a negative size, or a missing key.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError(
            f"{path}: COCO result JSON is a list of detections, this is a {type(entries).__name__}"
        )
    index = image_index(ids)
    image, label = np.empty(len(entries), np.int64), np.empty(len(entries), np.int64)
    box, score = np.empty((len(entries), 4)), np.empty(len(entries))
    known = range(1, classes + 1) if categories is None else categories
    label_of = {category: c for c, category in enumerate(known)}
    for k, entry in enumerate(entries):
        try:
            image[k] = index.get(json_id(entry["image_id"]), -1)
            label[k] = label_of.get(json_id(entry["category_id"]), -1)
            x, y, width, height = entry["bbox"]
            box[k], score[k] = (x, y, width, height), entry["score"]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: detection {k + 1}: {str(entry)[:200]}; each is {FORM}") from None
    numbers = list(known)
    named = ", ".join(map(str, numbers[:8])) + " …" * (len(numbers) > 8)
    for rule, bad in (
        (f"image_id is none of this set's (as {ids[0]!r} is one)", image < 0),
        (f"category_id is none of the classes' ({named})", label < 0),
        ("bbox and score are finite numbers", ~np.isfinite(np.column_stack([box, score])).all(1)),
        ("width and height are not negative", (box[:, 2:] < 0).any(1)),
    ):
        if bad.any():
            k = int(bad.argmax())
            raise UserError(f"{path}: detection {k + 1}: {str(entries[k])[:200]}; {rule}")
    area = box[:, 2] * box[:, 3]  # from corners, 32 × 32 may be a little less
    box[:, 2:] += box[:, :2]
    return Boxes(image, label, box, score, area=area)


def image_index(ids: Sequence) -> dict[int | str, int]:
    """Where an image is, by its id, as it is and as text, and by the number that its digits spell.

    That number counts where every id has digits and no two spell the same.
    """
    index: dict[int | str, int] = {str(i): k for k, i in enumerate(ids)}
    if all(isinstance(i, int) for i in ids):
        return index | {i: k for k, i in enumerate(ids)}
    numbers = ["".join(c for c in str(i) if c in digits) for i in ids]
    if all(numbers) and len({int(n) for n in numbers}) == len(ids):
        index |= {int(n): k for k, n in enumerate(numbers)}
    return index


def read_voc_results(folder: Path, split: str, ids: Sequence, classes: Sequence[str]) -> Boxes:
    """Read `comp3_det_SPLIT_CLASS.txt` (any comp number) of every class; corners become half-open, from 0.

    A class without a file has no detections, said on stderr; so are boxes that seem to count from 0. Raises UserError
    when no class has a file, when a class has two, for a file of an unknown class, and for a line that cannot be read,
    names an unknown image, or has a corner on the wrong side.
    """
    index, rows, labels, missing = image_index(ids), [], [], []
    files = _files_by_class(folder, split)
    if strange := sorted(files.keys() - set(classes)):
        raise UserError(
            f"{files[strange[0]]}: of no class of {', '.join(classes)}; rename it, take it away, or name the class in "
            "--classes"
        )
    for c, name in enumerate(classes):
        if name not in files:
            missing.append(name)
            continue
        for number, line in enumerate(read_lines(files[name]), 1):
            if line:
                rows.append(_row(line, index, f"{files[name]} line {number}"))
                labels.append(c)
    if len(missing) == len(classes):
        raise UserError(
            f"{folder}: no comp3_det_{split}_CLASS.txt of a class of {', '.join(classes)} ({found(folder)})"
        )
    if missing:
        print(f"no file, so no detections, of {', '.join(missing)}", file=sys.stderr)
    values = np.array(rows, np.float64).reshape(-1, 6)
    if len(values) and 0 <= values[:, 2:4].min() < 1:  # unclipped boxes have negative corners
        count = int((values[:, 2:4] < 1).any(1).sum())
        print(f"{count} × box begins before pixel 1, from which VOC counts; are all from 0?", file=sys.stderr)
    box = values[:, 2:] - [1, 1, 0, 0]
    return Boxes(values[:, 0].astype(np.int64), np.array(labels, np.int64), box, values[:, 1])


def _files_by_class(folder: Path, split: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(filter(lambda path: is_data(path.name), folder.glob(f"*_det_{escape(split)}_*.txt"))):
        name = path.stem.partition(f"_det_{split}_")[2]
        if name in files:
            raise UserError(
                f"{folder}: {files[name].name} and {path.name} are both of class {name}; leave one"
            )
        files[name] = path
    return files


def _row(line: str, index: dict[str | int, int], where: str) -> list[float]:
    parts = line.rsplit(maxsplit=5)  # an image's name may hold spaces
    try:
        score, x0, y0, x1, y1 = (float(part) for part in parts[1:])
    except ValueError:
        score = x0 = y0 = x1 = y1 = np.nan
    if not np.isfinite([score, x0, y0, x1, y1]).all():
        raise UserError(f"{where}: '{line[:60]}' is not \"image score xmin ymin xmax ymax\"")
    if parts[0] not in index:
        raise UserError(f"{where}: image '{parts[0]}' is not in the split")
    if min(x1 - x0, y1 - y0) < -1 - 1e-6:  # inclusive: a box of width 0 ends a pixel before its beginning
        raise UserError(f"{where}: '{line[:60]}': xmax or ymax lies before xmin or ymin")
    return [index[parts[0]], score, x0, y0, x1, y1]
