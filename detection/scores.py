"""Scores of detections as plain data: the statistics of a cell, its metrics, the per-class table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from backbench.common.data.types import DetectionSet
from backbench.common.metrics import coco, rescore
from backbench.common.metrics.average_precision import RIGHT, Boxes, class_ap, match, ranked

IOU = 0.5


def truth_of(images: DetectionSet) -> Boxes:
    """The objects of a set as published, flat: what its readers clip or drop for training is scored as it stands."""
    known = images.truth
    if known is None:
        known = list(zip(images.boxes, images.labels, images.difficult))
    boxes, labels, difficult = (np.concatenate([part[k] for part in known]) for k in range(3))
    return Boxes(
        image=np.repeat(np.arange(len(images)), [len(part[1]) for part in known]),
        label=labels,
        box=boxes.astype(np.float64),
        difficult=difficult,
        area=None
        if images.truth is None or known[0].areas is None
        else np.concatenate([t.areas for t in known]),
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
