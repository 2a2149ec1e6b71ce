"""Score detections of any origin against a VOC-layout data set or COCO's instance format.

    python detection/evaluate.py --devkit VOCDEVKIT --year 2007 --split test --detections results/
    python detection/evaluate.py --devkit DIR --split test --detections predictions.json --json scores.json
    python detection/evaluate.py --annotations instances_val2017.json --detections results.json

DETECTIONS is COCO result JSON (boxes are x, y, width, height), or a folder of VOC's text files, one a class:
comp3_det_test_CLASS.txt with lines "image score xmin ymin xmax ymax" in 1-based pixels. A category_id is that of
the annotations; where these have none (VOC), or with --category-ids order, it is 1 + the class's place in the list of
classes: that of --classes, of the run whose predictions.json is scored, or the one that training finds in the devkit.
Objects are scored as they are published, as the tools of --preset do: no box is clipped or dropped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.arguments import Parser
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import write_json
from backbench.common.data.layout import Report
from backbench.common.data.readers.coco import read_instances
from backbench.common.data.readers.voc import read_published
from backbench.common.data.registry import DataSpec
from backbench.common.metrics import coco
from backbench.common.metrics.average_precision import PRESETS, Boxes, Convention, match
from backbench.detection.class_list import MODEL, devkit_classes, given_classes, run_classes
from backbench.detection.curves import curves
from backbench.detection.results import read_results, read_voc_results
from backbench.detection.scores import IOU, by_size, fraction, per_class, percent, scores, table_lines


@dataclass
class Annotations:
    """What detections are compared with. `categories`: the classes' ids in result JSON, or None for 1, 2, …"""

    ids: Sequence
    classes: list[str]
    truth: Boxes
    categories: list[int] | None
    report: list[str]


def main(argv: list[str] | None = None) -> int:
    """Arguments → annotations → detections → the per-class table, and JSON when asked for."""
    args = arguments().parse_args(argv)
    if not 0 < args.iou <= 1:
        raise UserError(f"--iou {args.iou}: a share above 0 and at most 1")
    path = args.detections.expanduser()
    if args.annotations:
        if args.year or args.classes or args.rescale:
            raise UserError(
                f"--annotations {args.annotations}: --year, --classes and --rescale are for --devkit"
            )
        known = read_annotations(args.annotations.expanduser())
    else:
        known = read_devkit(args, path)
    if args.category_ids == "order":
        known.categories = None
    if path.is_dir():
        found = read_voc_results(path, args.split, known.ids, known.classes)
    elif path.suffix == ".txt":
        raise UserError(f"{path}: VOC's text files are read by the folder: --detections {path.parent}")
    else:
        found = read_results(path, known.ids, len(known.classes), known.categories)
    convention = PRESETS[args.preset]
    if (
        path.is_dir()
    ):  # text files were rounded by whoever wrote them; their evaluators take them as they stand
        convention = replace(convention, score_digits=None, box_digits=None)
    with_coco = args.coco or bool(args.annotations)
    result = score(found, known, args.iou, args.preset, convention, with_coco)
    for line in known.report:
        print(f"data: {line}", file=sys.stderr)
    print("\n".join(summary_lines(result)))
    if args.json:
        write_json(args.json.expanduser(), result)
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--devkit", help="a VOCdevkit, or one folder of that layout")
    source.add_argument(
        "--annotations", type=Path, metavar="FILE", help="JSON in COCO's instance format; needs no images"
    )
    made.add_argument("--year", help="of a VOCdevkit with several: 2007, 2012 or 2007+2012")
    made.add_argument(
        "--split",
        default="test",
        help="list of ImageSets/Main, or part of the text files' names (default: test)",
    )
    made.add_argument(
        "--classes",
        help="the detector's classes in their order, joined by + (default: the run's, the devkit's)",
    )
    made.add_argument(
        "--rescale",
        action="store_true",
        help="scale boxes that were drawn for another size of their image, as rescale=1 does in training",
    )
    made.add_argument("--detections", required=True, type=Path, help="a COCO result JSON or a folder")
    made.add_argument(
        "--category-ids",
        default="file",
        choices=["file", "order"],
        help="what category_id counts: the annotations' ids, or 1 + the class's place (default: file)",
    )
    made.add_argument("--iou", type=float, default=IOU, help=f"IoU of a match (default: {IOU})")
    made.add_argument(
        "--preset",
        default="voc-devkit",
        choices=list(PRESETS),
        help="whose conventions (default: voc-devkit); detectron2 also gives its AP, AP50 and AP75: the mean mAP, "
        "by 11 points, over IoU .5 to .95, and at .5 and .75",
    )
    made.add_argument(
        "--coco",
        action="store_true",
        help="COCO's AP too, difficult objects as its crowd regions; with --annotations it always is given",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the scores as fractions")
    return made


def read_devkit(args: argparse.Namespace, detections: Path) -> Annotations:
    """The objects of one split as published, and the classes that `detections` number (`class_list`)."""
    split, classes = args.split, args.classes
    options = {"year": args.year} if args.year else {}
    spec = DataSpec(
        "voc", str(Path(args.devkit).expanduser()), options | ({"rescale": "1"} if args.rescale else {})
    )
    read = read_published(spec, split)
    used = sorted(set(read.names))
    categories = None
    if classes:
        names, where = given_classes(classes), f"--classes {classes}"
    elif run := run_classes(detections):
        (names, categories), where = run, detections.parent / MODEL
    else:
        names, where = devkit_classes(spec, split, used, numbered=not detections.is_dir()), ""
    if strange := [name for name in used if name not in names]:
        raise UserError(f"{where}: knows no class '{strange[0]}', of which split {split} has objects; add it")
    place = {name: c for c, name in enumerate(names)}
    label = np.array([place[name] for name in read.names], np.int64)
    return Annotations(
        read.ids, names, Boxes(read.image, label, read.box, difficult=read.difficult), categories, read.report
    )


def read_annotations(file: Path) -> Annotations:
    """COCO's instance format, boxes as they stand there; crowd regions count neither way.

    The images are put in the order of their ids: by it pycocotools ranks detections of equal scores.
    """
    report = Report()
    read = read_instances(file, report)
    box = np.hstack([read.box[:, :2], read.box[:, :2] + read.box[:, 2:]])
    order = sorted(range(len(read.ids)), key=read.ids.__getitem__)
    truth = Boxes(np.argsort(order)[read.image], read.label, box, difficult=read.crowd, area=read.area)
    ids = [read.ids[k] for k in order]
    return Annotations(ids, list(read.categories.values()), truth, list(read.categories), report.lines())


def score(
    found: Boxes, known: Annotations, iou: float, preset: str, convention: Convention, with_coco: bool
) -> dict[str, Any]:
    """All scores as fractions: `mAP_11point`, `mAP_area`, per class, and COCO's and detectron2's where asked.

    `preset` is the name of the `convention`, which may round less than the preset does.
    """
    shape = (known.truth, len(known.ids), len(known.classes))
    stats = match(found, *shape, iou, convention)
    coco_stats = coco.match(found, *shape) if with_coco else None
    metrics, table = scores(stats), per_class(stats, known.truth, known.classes, coco_stats)
    result: dict[str, Any] = {
        "mAP_11point": metrics["mAP"],
        "mAP_area": metrics["mAP_area"],
        "AP_11point": {name: row["AP"] for name, row in table.items()},
        "AP_area": {name: row["AP_area"] for name, row in table.items()},
        "classes": table,
        "curves": curves(stats, known.classes),
        "iou": iou,
        "preset": preset,
        "images": len(known.ids),
        "images_without_detections": len(known.ids) - len(np.unique(found.image)),
        "detections": len(found.image),
        "data": known.report,
    }
    if coco_stats is not None:
        sizes = by_size(coco_stats)
        result["COCO"] = {name: fraction(value[0]) for name, value in coco.rescore(coco_stats).items()}
        result["COCO"] |= {name: row["AP"] for name, row in sizes.items()}
        result["sizes"] = sizes
    if preset == "detectron2":
        means = [scores(match(found, *shape, t, convention))["mAP"] for t in coco.THRESHOLDS]
        mean = None if None in means else sum(means) / len(means)
        result["detectron2"] = {"AP": mean, "AP50": means[0], "AP75": means[5]}
    return result


def summary_lines(result: dict[str, Any]) -> list[str]:
    """The table of classes, and the totals below it."""
    metrics = {"mAP": result["mAP_11point"], "mAP_area": result["mAP_area"], **result.get("COCO", {})}
    lines = [*table_lines(result["classes"], metrics), ""]
    lines.append(
        f"images: {result['images']} (without a detection: {result['images_without_detections']}), detections: "
        f"{result['detections']}, IoU {result['iou']:g}, convention {result['preset']}"
    )
    for name in ("COCO", "detectron2"):
        if name in result:
            lines.append(f"{name}: {', '.join(f'{k} {percent(v)}' for k, v in result[name].items())}")
    return lines


if __name__ == "__main__":
    run_main(main)
