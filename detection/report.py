"""The score stage of a run: from predictions.json to the finished cell and its report."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from backbench.common.base.files import write_text
from backbench.common.data.types import DetectionSet
from backbench.common.metrics import coco
from backbench.common.run.cell import Run
from backbench.detection.chance import DRAWS, chance
from backbench.detection.curves import curves, picture
from backbench.detection.mistakes import KINDS, count_mistakes, draw_mistakes, find_mistakes
from backbench.detection.results import read_results
from backbench.detection.scores import (
    IOU,
    by_size,
    cell_statistics,
    per_class,
    percent,
    scores,
    table_lines,
    truth_of,
)

CURVES = "precision_recall.svg"
SIZES = {
    "AP": "all",
    "APs": "small (area to 32²)",
    "APm": "medium (32² to 96²)",
    "APl": "large (from 96²)",
}


def finish(
    run: Run, train_set: DetectionSet, test_set: DetectionSet, device: torch.device, cost: Mapping[str, Any]
) -> dict[str, float | None]:
    """The score stage: statistics, scores and chance from predictions.json, then the finished cell."""
    truth, names = truth_of(test_set), test_set.classes
    found = read_results(run.folder / "predictions.json", test_set.ids, len(names), test_set.categories)
    stats = cell_statistics(found, test_set)
    metrics, baseline = scores(stats), chance(found, test_set)
    if metrics["mAP"] is None:
        run.note("mAP n/a: no test image has an object that is not difficult; use a larger --limit")
    coco_stats = coco.match(found, truth, len(test_set), len(names))
    table = per_class(stats, truth, names, coco_stats)
    data = curves(stats, names)
    write_text(run.folder / CURVES, picture(data, {name: row["AP"] for name, row in table.items()}))
    made = find_mistakes(stats, found, truth)
    report = {
        "metrics": metrics,
        "chance": baseline,
        "iou": IOU,
        "convention": "voc-devkit",
        "classes": table,
        "category_ids": test_set.categories or list(range(1, len(names) + 1)),
        "sizes": by_size(coco_stats),
        "mistakes": count_mistakes(stats, made),
        "mistake pictures": draw_mistakes(run.folder, made, test_set),
        "train": _summary(replace(train_set, truth=None)),
        "test": _summary(test_set),
        "detections": len(found.image),
        "curves": data,
    }
    run.finish(
        metrics=metrics,
        chance=baseline,
        primary="mAP",
        images={"ids": np.array([str(i) for i in test_set.ids]), **stats},
        report=report,
        report_md="\n".join(_markdown(run, report, cost)),
        device=device,
        cost=cost,
    )
    return metrics


def _summary(images: DetectionSet) -> dict[str, Any]:
    """What is scored of a set, or, without its `truth`, trained on."""
    truth = truth_of(images)
    counts = np.bincount(truth.label, minlength=len(images.classes)).tolist()
    return {
        "images": len(images),
        "objects": len(truth.image),
        "difficult": int(truth.difficult.sum()),
        "without objects": len(images) - len(np.unique(truth.image)),
        "objects by class": dict(zip(images.classes, counts)),
        "left out": list(images.skipped),
    }


def _markdown(run: Run, report: Mapping[str, Any], cost: Mapping[str, Any]) -> list[str]:
    who, metrics = run.identity, report["metrics"]
    keys = ("images", "objects", "difficult", "without objects")
    return [
        f"# Detection: {who.model} on {who.data}, backbone {who.backbone} ({who.arch}), seed {who.seed}",
        "",
        "| metric | score | chance |",
        "|---|---:|---:|",
        *(
            f"| {name} | {percent(value)} | {percent(report['chance'].get(name))} |"
            for name, value in metrics.items()
        ),
        "",
        f"In per cent. VOC average precision at IoU ≥ {IOU}: mAP by 11 points (VOC2007), mAP_area by the area (VOC2010 "
        "on). COCO's: AP over IoU .5 to .95, AP50, AP75. Difficult objects count neither way (for COCO they are crowd "
        "regions). Chance: every image's detections given to another image, class and box together; the mean of "
        f"{DRAWS} draws.",
        "",
        *table_lines(report["classes"], metrics),
        "",
        f"![Precision over recall, a panel a class]({CURVES})",
        "",
        "| size of the object | AP (COCO) | objects |",
        "|---|---:|---:|",
        *(
            f"| {SIZES[name]} | {percent(row['AP'])} | {row['objects']} |"
            for name, row in report["sizes"].items()
        ),
        "",
        *_mistakes(report),
        f"Recipe {who.recipe}: {cost['iterations']} iterations, {cost['images']} images, "
        f"{cost['seconds']:.0f} s of training.",
        "",
        f"| data | {' | '.join(keys)} |",
        "|---|" + "---:|" * len(keys),
        *(
            f"| {name} | {' | '.join(str(report[part][key]) for key in keys)} |"
            for name, part in (("training", "train"), ("test", "test"))
        ),
        "",
        *(f"- {line}" for line in run.notes),
    ]


def _mistakes(report: Mapping[str, Any]) -> list[str]:
    """The mistakes by kind, what each costs, and the pictures of the surest."""
    lines = [
        "## Mistakes",
        "",
        "| kind | of the surest | of all | mAP without them |",
        "|---|---:|---:|---:|",
    ]
    for kind, row in report["mistakes"].items():
        sure = "" if row["sure"] is None else row["sure"]
        lines.append(f"| {kind} | {sure} | {row['all']} | {percent(row['mAP_without'])} |")
    lines += [
        "",
        "Of a wrong detection the object it overlaps most decides. *Duplicate*: IoU ≥ .5 with an object of its class "
        "that a surer one has claimed; *localisation*: IoU .1 to .5 with one of its class; *confusion*: IoU ≥ .1 with "
        "one of another class; *background*: less with every object; *missed*: an object that nothing claims. *The "
        "surest*: of each class as many detections as it has objects. (Hoiem et al. 2012, Bolya et al. 2020.)",
        "",
    ]
    pictures = report["mistake pictures"]
    for kind in (kind for kind in KINDS if kind in pictures):
        what = "the largest" if kind == "missed" else "the surest"
        title = f"{what}, one an image; red: the detection; light blue: the object"
        lines += [f"**{kind}** ({title})", "", f"![{kind}]({pictures[kind]})", ""]
    return lines
