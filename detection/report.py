"""From detections to scores: the statistics of a cell, the per-class table, the report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.cell import Run
from common.data.types import DetectionSet
from common.engine import SPLIT, stream
from common.files import write_text
from common.metrics import coco, rescore
from common.metrics.average_precision import RIGHT, Boxes, class_ap, match, ranked
from detection.curves import curves, picture
from detection.mistakes import KINDS, count_mistakes, draw_mistakes, find_mistakes
from detection.results import read_results

IOU = 0.5
CURVES = "precision_recall.svg"
SIZES = {
    "AP": "all",
    "APs": "small (area to 32²)",
    "APm": "medium (32² to 96²)",
    "APl": "large (from 96²)",
}


def truth_of(images: DetectionSet) -> Boxes:
    """The objects of a set as flat arrays."""
    return Boxes(
        image=np.repeat(np.arange(len(images)), [len(labels) for labels in images.labels]),
        label=np.concatenate(images.labels),
        box=np.concatenate(images.boxes).astype(np.float64),
        difficult=np.concatenate(images.difficult),
    )


def cell_statistics(found: Boxes, images: DetectionSet) -> dict[str, np.ndarray]:
    """What images.npz holds: `average_precision.match` at IoU .5 by the devkit's convention, COCO's marks beside it.

    The marks are pycocotools' where detections come image by image, as from predictions.json.
    """
    truth, classes = truth_of(images), len(images.classes)
    stats = match(found, truth, len(images), classes, IOU)
    return {**stats, "coco_mark": coco.mark(found, truth, classes)[ranked(found)[0]]}


def scores(stats: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """`mAP` (11-point), `mAP_area` and, given COCO's marks, `AP`, `AP50`, `AP75`: fractions; None without an object."""
    return {name: fraction(value[0]) for name, value in rescore("detection", stats).items()}


def fraction(value: float) -> float | None:
    """A float, or None for NaN."""
    return None if np.isnan(value) else float(value)


def chance(found: Boxes, images: DetectionSet) -> dict[str, float]:
    """The same scores with the labels of all detections shuffled (a fixed seed)."""
    shuffled = replace(found, label=stream(SPLIT, 0).permutation(found.label))
    values = scores(cell_statistics(shuffled, images))
    return {name: value for name, value in values.items() if value is not None}


def by_size(coco_stats: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """COCO's AP of all, small (to 32²), medium (to 96²) and large objects, with their numbers, of `coco.match`."""
    ap = coco.strata(coco_stats)
    counts = coco_stats["coco_positives"].sum((0, 1)).tolist()
    return {name: {"AP": fraction(ap[name]), "objects": n} for name, n in zip(ap, counts)}


def per_class(
    stats: Mapping[str, np.ndarray],
    truth: Boxes,
    classes: Sequence[str],
    coco_stats: Mapping[str, np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each class: objects (not difficult), difficult ones, images with it, detections, recall, its APs.

    `stats` is of `match`; of `coco.match`, where given, comes `AP_coco`.
    """
    ap = {name: value[0] for name, value in class_ap(stats).items()}
    if coco_stats is not None:
        ap["AP_coco"] = coco.class_ap(coco_stats)[0].mean(-1)
    table = {}
    for c, name in enumerate(classes):
        objects = int(stats["positives"][:, c].sum())
        mine = stats["label"] == c
        right = int((stats["mark"][mine] == RIGHT).sum())
        table[name] = {
            "objects": objects,
            "difficult": int(truth.difficult[truth.label == c].sum()),
            "images": len(np.unique(truth.image[truth.label == c])),
            "detections": int(mine.sum()),
            "recall": right / objects if objects else None,
            **{key: fraction(value[c]) for key, value in ap.items()},
        }
    return table


def table_lines(table: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float | None]) -> list[str]:
    """The per-class table with its means, as Markdown."""
    names = {"AP": "AP (11-point)", "AP_area": "AP (area)", "AP_coco": "AP (COCO)"}
    means = {"AP": "mAP", "AP_area": "mAP_area", "AP_coco": "AP"}
    keys = [key for key in names if all(key in row for row in table.values())]
    lines = [
        f"| class | {' | '.join(names[key] for key in keys)} | recall | objects | difficult | detections |",
        "|---|" + "---:|" * (len(keys) + 4),
    ]
    for name, row in table.items():
        shares = " | ".join(percent(row[key]) for key in (*keys, "recall"))
        lines.append(f"| {name} | {shares} | {row['objects']} | {row['difficult']} | {row['detections']} |")
    total = [sum(row[key] for row in table.values()) for key in ("objects", "difficult", "detections")]
    shares = " | ".join(percent(metrics[means[key]]) for key in keys)
    return [*lines, f"| **mean / total** | {shares} |  | {total[0]} | {total[1]} | {total[2]} |"]


def percent(value: float | None) -> str:
    """A fraction as per cent with two decimals, or n/a."""
    return "n/a" if value is None else f"{100 * value:.2f}"


def finish(
    run: Run, train_set: DetectionSet, test_set: DetectionSet, device: torch.device, cost: Mapping[str, Any]
) -> dict[str, float | None]:
    """The score stage: statistics, scores and chance from predictions.json, then the finished cell."""
    found = read_results(run.folder / "predictions.json", test_set.ids, len(test_set.classes))
    truth, names = truth_of(test_set), test_set.classes
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
        "sizes": by_size(coco_stats),
        "mistakes": count_mistakes(stats, made),
        "mistake pictures": draw_mistakes(run.folder, made, test_set),
        "train": _summary(train_set),
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
    truth = truth_of(images)
    counts = np.bincount(truth.label, minlength=len(images.classes)).tolist()
    return {
        "images": len(images),
        "objects": len(truth.image),
        "difficult": int(truth.difficult.sum()),
        "without objects": sum(not len(labels) for labels in images.labels),
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
        "regions). Chance: the same boxes, labels shuffled.",
        "",
        *table_lines(report["classes"], metrics),
        "",
        f"![Precision over recall, a panel a class]({CURVES})",
        "",
        "| size | AP (COCO) | objects |",
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
