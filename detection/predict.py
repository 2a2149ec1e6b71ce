"""Draw what a trained detector finds in pictures, and write it as JSON.

    python detection/predict.py --run results/VOC/detection/ssd300/paper/cutmix/seed0 photo.jpg holiday/ --out found

RUN is the folder of a finished detection/finetune.py: weights.pt and model.json (architecture, classes, normalisation,
recipe) are read, nothing else. A folder stands for the pictures directly in it that can be read. OUT gets one
picture with boxes for each, and detections.json: a list of {"image", "width", "height", "drawn", "objects": [{"class",
"score", "box"}]}, best first, boxes as x0, y0, x1, y1 in pixels of the upright picture.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
import colorsys
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backbench.common.base.arguments import Parser
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, write_json
from backbench.common.data.decode import read_headers, read_rgb
from backbench.common.data.pictures import find_pictures, picture_names, write_jpeg
from backbench.common.data.types import DetectionSet
from backbench.common.engine import pick_device
from backbench.detection.build import load_detector
from backbench.detection.detect import predict


def main(argv: list[str] | None = None) -> int:
    """Arguments → model → pictures → detections → drawings and detections.json."""
    args = arguments().parse_args(argv)
    if not 0 <= args.score <= 1:
        raise UserError(f"--score {args.score}: a score from 0 to 1")
    device = pick_device(args.device)
    model, recipe, classes = load_detector(args.run.expanduser())
    images = open_pictures(args.pictures, classes)
    out = make_folder(args.out.expanduser())
    found = predict(model, images, recipe, device)
    records = []
    for i, (path, name) in enumerate(zip(images.paths, images.ids)):
        rows = np.flatnonzero((found.image == i) & (found.score >= args.score))
        objects = [
            {
                "class": classes[found.label[k]],
                "score": round(float(found.score[k]), 4),
                "box": [round(float(v), 2) for v in found.box[k]],
            }
            for k in rows
        ]
        picture = draw_boxes(read_rgb(path, frame=images.sizes[i]), objects, classes)
        write_jpeg(out / name, picture)
        size = dict(zip(("width", "height"), images.sizes[i].tolist()))
        records.append({"image": str(path), **size, "drawn": name, "objects": objects})
        print(f"{path}: {summary(objects)}")
    write_json(out / "detections.json", records)
    total = sum(len(record["objects"]) for record in records)
    print(f"{total} objects of score {args.score:g} or more in {len(records)} pictures → {out}")
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("pictures", nargs="+", type=Path, help="picture files and folders of them")
    made.add_argument("--run", required=True, type=Path, help="folder of a finished detection/finetune.py")
    made.add_argument("--out", type=Path, default=Path("detections"), help="(default: detections)")
    made.add_argument("--score", type=float, default=0.5, help="least score that is shown (default: 0.5)")
    made.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU when there is one)")
    return made


def open_pictures(given: Sequence[Path], classes: Sequence[str]) -> DetectionSet:
    """Pictures and the pictures in folders, in order, as a set without objects; `ids` are file names to draw into.

    Raises UserError as `find_pictures` does.
    """
    paths = find_pictures(given)
    headers = read_headers(paths)
    turned = headers[:, 2:] >= 5
    none = np.zeros(0, np.int64)
    return DetectionSet(
        name="pictures",
        classes=list(classes),
        ids=picture_names(paths),
        paths=paths,
        sizes=np.where(turned, headers[:, 1::-1], headers[:, :2]),
        boxes=[np.zeros((0, 4), np.float32)] * len(paths),
        labels=[none] * len(paths),
        difficult=[none.astype(bool)] * len(paths),
    )


def summary(objects: Sequence[dict[str, Any]]) -> str:
    """What was found, in words: "2 person, 1 dog", most frequent first."""
    names = [one["class"] for one in objects]
    counts = sorted({(-names.count(name), name) for name in names})
    return ", ".join(f"{-count} {name}" for count, name in counts) or "nothing"


def draw_boxes(image: np.ndarray, objects: Sequence[dict[str, Any]], classes: Sequence[str]) -> Image.Image:
    """The uint8 picture (H, W, 3) with each object's box, class and score, the best on top; a colour a class."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    side = max(picture.size)
    font, width = ImageFont.load_default(size=max(11, side / 45)), max(2, round(side / 250))
    for one in reversed(objects):
        colour = class_colour(classes.index(one["class"]), len(classes))
        x0, y0, x1, y1 = one["box"]
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=width)
        text = f"{one['class']} {one['score']:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        tall, wide = bottom - top + 4, right - left + 6
        x = min(max(0, x0), max(0, picture.width - wide))
        y = y0 - tall if y0 >= tall else y0
        draw.rectangle((x, y, x + wide, y + tall), fill=colour)
        draw.text((x + 3 - left, y + 2 - top), text, fill="white", font=font)
    return picture


def class_colour(label: int, classes: int) -> tuple[int, int, int]:
    """A colour for a class: hues evenly apart, dark enough for white letters."""
    red, green, blue = colorsys.hls_to_rgb(label / max(1, classes), 0.38, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


if __name__ == "__main__":
    run_main(main)
