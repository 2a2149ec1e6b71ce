"""Score detections of any origin against a VOC-layout data set.

    python detection/evaluate.py --devkit VOCDEVKIT --year 2007 --split test --detections results/
    python detection/evaluate.py --devkit DIR --split test --detections predictions.json --json scores.json

DETECTIONS is COCO result JSON (category_id is 1 + the class's place in the list of classes, boxes are
x, y, width, height), or a folder of VOC's text files, one a class: comp3_det_test_CLASS.txt with lines
"image score xmin ymin xmax ymax" in 1-based pixels.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import sys
from pathlib import Path

import numpy as np

from common.data.spec import DataSpec
from common.data.types import DetectionSet
from common.data.voc import read_voc
from common.errors import UserError, run_main
from common.files import write_json
from common.metrics.average_precision import PRESETS, Boxes
from detection.report import IOU, per_class, scores, statistics, table_lines
from detection.results import image_index, read_results


def main(argv: list[str] | None = None) -> int:
    """Arguments → annotations → detections → the per-class table, and JSON when asked for."""
    args = arguments().parse_args(argv)
    if not 0 < args.iou <= 1:
        raise UserError(f"--iou {args.iou}: a share above 0 and at most 1")
    images = read_annotations(args.devkit, args.year, args.split, args.classes)
    path = args.detections.expanduser()
    if path.is_dir():
        found = read_voc_results(path, args.split, images)
    else:
        found = read_results(path, images.ids, len(images.classes))
    stats = statistics(found, images, args.iou, PRESETS[args.preset])
    metrics, table = scores(stats), per_class(stats, images)
    for line in images.report:
        print(f"data: {line}", file=sys.stderr)
    print("\n".join(table_lines(table, metrics)))
    print(
        f"\n{len(images)} images, {len(found.image)} detections, IoU {args.iou:g}, convention {args.preset}"
    )
    if args.json:
        write_json(
            args.json,
            {
                "mAP_11point": metrics["mAP"],
                "mAP_area": metrics["mAP_area"],
                "AP_11point": {name: row["AP"] for name, row in table.items()},
                "AP_area": {name: row["AP_area"] for name, row in table.items()},
                "classes": table,
                "iou": args.iou,
                "preset": args.preset,
                "images": len(images),
                "detections": len(found.image),
            },
        )
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--devkit", required=True, help="a VOCdevkit, or one folder of that layout")
    made.add_argument("--year", help="of a VOCdevkit with several: 2007, 2012 or 2007+2012")
    made.add_argument("--split", default="test", help="list of ImageSets/Main to score (default: test)")
    made.add_argument(
        "--classes", help="classes in their order, joined by + (default: as training finds them)"
    )
    made.add_argument("--detections", required=True, type=Path, help="a COCO result JSON or a folder")
    made.add_argument("--iou", type=float, default=IOU, help=f"IoU of a match (default: {IOU})")
    made.add_argument(
        "--preset",
        default="voc-devkit",
        choices=list(PRESETS),
        help="whose conventions (default: voc-devkit)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the scores as fractions")
    return made


def read_annotations(devkit: str, year: str | None, split: str, classes: str | None = None) -> DetectionSet:
    """The images of one split. The classes are those that training finds: of trainval, if it is there, and this."""
    options = {key: value for key, value in (("year", year), ("classes", classes)) if value}
    for train in ("trainval", split):
        try:
            spec = DataSpec("voc", str(Path(devkit).expanduser()), {**options, "train": train, "test": split})
            return read_voc(spec)[1]
        except UserError as error:
            if train == split or f"{train}.txt: no such split" not in str(error):
                raise
    raise AssertionError("unreachable")


def read_voc_results(folder: Path, split: str, images: DetectionSet) -> Boxes:
    """Read `comp3_det_SPLIT_CLASS.txt` (any comp number) of every class; corners become half-open, from 0.

    A class without a file has no detections, said on stderr. Raises UserError when no class has one, when a
    class has two, and for a line that cannot be read or names an unknown image.
    """
    index, rows, labels, missing = image_index(images.ids), [], [], []
    for c, name in enumerate(images.classes):
        files = sorted(folder.glob(f"*_det_{split}_{name}.txt"))
        if len(files) > 1:
            raise UserError(
                f"{folder}: {files[0].name} and {files[1].name} are both of class {name}; leave one"
            )
        if not files:
            missing.append(name)
            continue
        for number, line in enumerate(files[0].read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                rows.append(_row(line, index, f"{files[0]} line {number}"))
                labels.append(c)
    if len(missing) == len(images.classes):
        raise UserError(
            f"{folder}: no file comp3_det_{split}_CLASS.txt of a class of {', '.join(images.classes)}"
        )
    if missing:
        print(f"no file, so no detections, of {', '.join(missing)}", file=sys.stderr)
    values = np.array(rows, np.float64).reshape(-1, 6)
    box = values[:, 2:] - [1, 1, 0, 0]
    return Boxes(values[:, 0].astype(np.int64), np.array(labels, np.int64), box, values[:, 1])


def _row(line: str, index: dict[str | int, int], where: str) -> list[float]:
    parts = line.split()
    try:
        image, numbers = index[parts[0]], [float(part) for part in parts[1:]]
    except KeyError:
        raise UserError(f"{where}: image '{parts[0]}' is not in the split") from None
    except ValueError:
        numbers = []
    if len(numbers) != 5 or not np.isfinite(numbers).all():
        raise UserError(f"{where}: '{line[:60]}' is not \"image score xmin ymin xmax ymax\"")
    return [image, *numbers]


if __name__ == "__main__":
    run_main(main)
