"""COCO result JSON: the file detections are kept in."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import read_json, write_text
from common.metrics.average_precision import Boxes


def write_results(path: Path, found: Boxes, ids: Sequence, categories: Sequence[int] | None = None) -> None:
    """Write COCO result JSON, one detection a line; `category_id` is 1 + the class's index, or that of `categories`.

    Boxes are rounded to .01 pixel, scores to six decimals; equal detections give equal bytes.
    """
    low, high = found.box[:, :2], found.box[:, 2:]
    boxes = np.round(np.hstack([low, high - low]).astype(np.float64), 2).tolist()
    scores = np.round(found.score.astype(np.float64), 6).tolist()
    names = [json.dumps(i if isinstance(i, int) else str(i)) for i in ids]
    numbers = (found.label + 1 if categories is None else np.asarray(categories)[found.label]).tolist()
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
            image[k] = index[entry["image_id"]]
            label[k] = label_of.get(entry["category_id"], -1)
            box[k], score[k] = entry["bbox"], entry["score"]
        except (KeyError, TypeError, ValueError) as error:
            what = f"image or key {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(
                f"{path}: detection {k + 1}: {what}; each is "
                '{"image_id", "category_id", "bbox": [x, y, width, height], "score"} of an image of this set'
            ) from None
    bad = ~np.isfinite(np.column_stack([box, score])).all(1) | (box[:, 2:] < 0).any(1)
    bad |= label < 0
    if bad.any():
        k = int(bad.argmax())
        named = f"1 to {classes}" if categories is None else f"one of {', '.join(map(str, categories))}"
        raise UserError(
            f"{path}: detection {k + 1}: {entries[k]}; category_id is {named}, numbers are finite, "
            "width and height not negative"
        )
    box[:, 2:] += box[:, :2]
    return Boxes(image, label, box, score)


def image_index(ids: Sequence) -> dict[str | int, int]:
    """Where an image is, by its id and, where no two ids share it, by the number its digits spell."""
    index: dict[str | int, int] = {}
    numbers = ["".join(c for c in str(i) if c.isdigit()) for i in ids]
    if all(numbers) and len({int(n) for n in numbers}) == len(ids):
        index |= {int(n): k for k, n in enumerate(numbers)}
    return index | {str(i): k for k, i in enumerate(ids)}
