"""From detections to scores: the statistics of a cell, the per-class table, the report."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.cell import Run
from common.data.types import DetectionSet
from common.engine import SPLIT, stream
from common.metrics import rescore
from common.metrics.average_precision import PRESETS, RIGHT, Boxes, Convention, class_ap, match
from detection.results import read_results

IOU = 0.5


def truth_of(images: DetectionSet) -> Boxes:
    """The objects of a set as flat arrays."""
    return Boxes(
        image=np.repeat(np.arange(len(images)), [len(labels) for labels in images.labels]),
        label=np.concatenate(images.labels),
        box=np.concatenate(images.boxes).astype(np.float64),
        difficult=np.concatenate(images.difficult),
    )


def statistics(
    found: Boxes,
    images: DetectionSet,
    iou: float = IOU,
    convention: Convention = PRESETS["voc-devkit"],
) -> dict[str, np.ndarray]:
    """What images.npz holds: `average_precision.match` of the detections with the set's objects."""
    return match(found, truth_of(images), len(images), len(images.classes), iou, convention)


def scores(stats: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """`mAP` (11-point) and `mAP_area` as fractions; None where no object is to be found."""
    values = {name: float(value[0]) for name, value in rescore("detection", stats).items()}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def chance(found: Boxes, images: DetectionSet) -> dict[str, float]:
    """The same scores with the labels of all detections shuffled (a fixed seed)."""
    shuffled = replace(found, label=stream(SPLIT, 0).permutation(found.label))
    return {name: value for name, value in scores(statistics(shuffled, images)).items() if value is not None}


def per_class(stats: Mapping[str, np.ndarray], images: DetectionSet) -> dict[str, dict[str, Any]]:
    """For each class: objects (not difficult), difficult ones, images with it, detections, recall, both APs."""
    ap = {name: value[0] for name, value in class_ap(stats).items()}
    truth = truth_of(images)
    table = {}
    for c, name in enumerate(images.classes):
        objects = int(stats["positives"][:, c].sum())
        mine = stats["label"] == c
        right = int((stats["mark"][mine] == RIGHT).sum())
        table[name] = {
            "objects": objects,
            "difficult": int(truth.difficult[truth.label == c].sum()),
            "images": len(np.unique(truth.image[truth.label == c])),
            "detections": int(mine.sum()),
            "recall": right / objects if objects else None,
            "AP": float(ap["AP"][c]) if objects else None,
            "AP_area": float(ap["AP_area"][c]) if objects else None,
        }
    return table


def table_lines(table: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float | None]) -> list[str]:
    """The per-class table with its means, as Markdown."""
    lines = [
        "| class | AP (11-point) | AP (area) | recall | objects | difficult | detections |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in table.items():
        shares = " | ".join(percent(row[key]) for key in ("AP", "AP_area", "recall"))
        lines.append(f"| {name} | {shares} | {row['objects']} | {row['difficult']} | {row['detections']} |")
    total = [sum(row[key] for row in table.values()) for key in ("objects", "difficult", "detections")]
    means = f"{percent(metrics['mAP'])} | {percent(metrics['mAP_area'])} |  "
    return [*lines, f"| **mean / total** | {means} | {total[0]} | {total[1]} | {total[2]} |"]


def percent(value: float | None) -> str:
    """A fraction as per cent with two decimals, or n/a."""
    return "n/a" if value is None else f"{100 * value:.2f}"


def finish(
    run: Run, train_set: DetectionSet, test_set: DetectionSet, device: torch.device, cost: Mapping[str, Any]
) -> dict[str, float | None]:
    """The score stage: statistics, scores and chance from predictions.json, then the finished cell."""
    found = read_results(run.folder / "predictions.json", test_set.ids, len(test_set.classes))
    stats = statistics(found, test_set)
    metrics, baseline = scores(stats), chance(found, test_set)
    if metrics["mAP"] is None:
        run.note("mAP n/a: no test image has an object that is not difficult; use a larger --limit")
    table = per_class(stats, test_set)
    run.finish(
        metrics=metrics,
        chance=baseline,
        primary="mAP",
        images={"ids": np.array([str(i) for i in test_set.ids]), **stats},
        report={
            "metrics": metrics,
            "chance": baseline,
            "iou": IOU,
            "convention": "voc-devkit",
            "classes": table,
            "train": _summary(train_set),
            "test": _summary(test_set),
            "detections": len(found.image),
        },
        report_md="\n".join(_markdown(run, metrics, baseline, table, train_set, test_set, cost)),
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


def _markdown(run: Run, metrics, baseline, table, train_set, test_set, cost) -> list[str]:
    who = run.identity
    parts = {"training": _summary(train_set), "test": _summary(test_set)}
    return [
        f"# Detection: {who.model} on {who.data}, backbone {who.backbone} ({who.arch}), seed {who.seed}",
        "",
        "| metric | score | chance |",
        "|---|---:|---:|",
        *(
            f"| {name} | {percent(value)} | {percent(baseline.get(name))} |"
            for name, value in metrics.items()
        ),
        "",
        f"VOC average precision at IoU ≥ {IOU}, in per cent: mAP by 11 points (VOC2007), mAP_area by the area "
        "(VOC2010 on); difficult objects count neither way. Chance: the same boxes, labels shuffled.",
        "",
        *table_lines(table, metrics),
        "",
        f"Recipe {who.recipe}: {cost['iterations']} iterations, {cost['images']} images, "
        f"{cost['seconds']:.0f} s of training.",
        "",
        "| data | images | objects | difficult | without objects |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | "
            + " | ".join(str(part[k]) for k in ("images", "objects", "difficult", "without objects"))
            + " |"
            for name, part in parts.items()
        ),
        "",
        *(f"- {line}" for line in run.notes),
    ]
