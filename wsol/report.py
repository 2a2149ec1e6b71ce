"""From score maps to scores: boxes, the threshold's choice, the cell and its report."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from common.cell import Run
from common.data.types import ImageSet
from common.engine import SPLIT, stream
from common.metrics import rescore
from common.metrics.localisation import IOU_RIGHT, best_centred_box, best_iou, shuffled_chance
from wsol.boxes import boxes_from_maps, from_crop, to_crop
from wsol.cam import ScoreMaps
from wsol.recipes import WSOLRecipe

THRESHOLDS = np.arange(1, 20) / 20  # .05, .10 … .95: what a chosen threshold is chosen from
LISTED = 10


def choose_threshold(
    maps: np.ndarray, truths: Sequence[np.ndarray], size: int
) -> tuple[float, dict[str, list]]:
    """The threshold that is right (IoU > .5) on most images, and the whole curve.

    maps (n, h, w) of the true classes, truths n × (k, 4) in pixels of the `size` × `size` crop. Of equals the
    one with the larger mean IoU.
    """
    found = boxes_from_maps(maps, size, THRESHOLDS)
    overlap = np.stack([best_iou(found[:, column], truths) for column in range(len(THRESHOLDS))], 1)
    right, mean = (overlap > IOU_RIGHT).mean(0), overlap.mean(0)
    pick = np.lexsort((-mean, -right))[0]
    curve = {"threshold": THRESHOLDS.tolist(), "GT-known Loc": right.tolist(), "mean IoU": mean.tolist()}
    return float(THRESHOLDS[pick]), curve


def finish(
    run: Run,
    tested: tuple[ScoreMaps, dict[str, np.ndarray]],
    test_set: ImageSet,
    held: tuple[ScoreMaps, dict[str, np.ndarray]] | None,
    held_out: ImageSet | None,
    train_set: ImageSet,
    device: torch.device,
    cost: dict[str, Any],
) -> None:
    """The score stage: boxes from the maps at the recipe's or the chosen threshold, then the finished cell."""
    recipe: WSOLRecipe = run.recipe
    frame = (recipe.resize, recipe.size)
    threshold, facts = recipe.threshold, {"chosen": "given by the recipe"}
    if not threshold:
        held_truths = [to_crop(boxes, *frame) for boxes in held_out.boxes]
        threshold, curve = choose_threshold(held[0].maps[:, 0], held_truths, recipe.size)
        facts = {"chosen": f"on {len(held_out)} training images that were not trained on", "curve": curve}
    truths = [to_crop(boxes, *frame) for boxes in test_set.boxes]
    outside = sum(len(truth) == 0 for truth in truths)
    if outside:
        run.note(f"data: {outside} test images have no box inside the crop: counted as not localised")
    images, boxes = statistics(*tested, truths, threshold, recipe.size)
    known = [boxes for boxes in train_set.boxes or [] if len(boxes)]
    centred = best_centred_box([to_crop(boxes, *frame) for boxes in known] or truths, recipe.size)
    images["iou_centred"] = best_iou(np.repeat(centred[None], len(truths), 0), truths)
    metrics = {name: float(values[0]) for name, values in rescore("wsol", images).items()}
    predicted = tested[0].classes[:, 1]
    chance = shuffled_chance(test_set.labels, truths, predicted, boxes["top1"], boxes["gt"], stream(SPLIT, 0))
    centred_right = images["iou_centred"] > IOU_RIGHT
    baseline = {
        "box": centred.tolist(),
        "chosen on": f"{len(known)} training images" if known else "the scored images themselves",
        "Top-1 Loc": float((centred_right & (images["rank"] == 0)).mean()),
        "GT-known Loc": float(centred_right.mean()),
    }
    images |= {
        "label": test_set.labels.astype(np.int32),
        "predicted": predicted,
        "box_top1": from_crop(boxes["top1"], *frame).astype(np.float32),
        "box_gt": from_crop(boxes["gt"], *frame).astype(np.float32),
    }
    report = {
        "metrics": metrics,
        "chance": chance,
        "centred box": baseline,
        "threshold": {"value": threshold, **facts},
        "IoU histogram": histogram(images["iou_gt"]),
        "best and worst": extremes(images, test_set),
    }
    run.finish(
        metrics=metrics,
        chance=chance,
        primary="Top-1 Loc",
        images=images,
        report=report,
        report_md=as_markdown(run, report, cost, len(test_set)),
        device=device,
        cost=cost,
    )
    print(
        f"Top-1 Loc {100 * metrics['Top-1 Loc']:.1f} % (chance {100 * chance['Top-1 Loc']:.1f}, centred box "
        f"{100 * baseline['Top-1 Loc']:.1f}) → {run.folder}"
    )


def statistics(
    maps: ScoreMaps, more: dict[str, np.ndarray], truths: Sequence[np.ndarray], threshold: float, size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per-image statistics for `common.metrics.localisation.rescore`, and the boxes behind them.

    The boxes, "gt" and "top1" (n, 4), are of the true and of the predicted class's map, in pixels of the crop.
    """
    of_truth = boxes_from_maps(maps.maps[:, 0], size, threshold)
    of_prediction = of_truth.copy()
    wrong = np.flatnonzero(maps.classes[:, 0] != maps.classes[:, 1])
    of_prediction[wrong] = boxes_from_maps(maps.maps[wrong, 1], size, threshold)
    images = {
        "ids": maps.ids,
        "rank": more["rank"].astype(np.int32),
        "iou_gt": best_iou(of_truth, truths),
        "iou_top1": best_iou(of_prediction, truths),
    }
    return images, {"gt": of_truth, "top1": of_prediction}


def histogram(overlap: np.ndarray) -> dict[str, int]:
    """Counts of images by IoU in tenths: "0.0–0.1" …"""
    counts, edges = np.histogram(overlap, 10, (0, 1))
    return {f"{low:.1f}–{high:.1f}": int(count) for low, high, count in zip(edges, edges[1:], counts)}


def extremes(images: dict[str, np.ndarray], test_set: ImageSet) -> dict[str, list[dict[str, Any]]]:
    """The images localised best and worst among those with the right class."""
    right = np.flatnonzero(images["rank"] == 0)
    order = right[np.argsort(-images["iou_top1"][right], kind="stable")]

    def entry(i: int) -> dict[str, Any]:
        box = [round(float(x), 4) for x in images["box_top1"][i]]
        name = test_set.classes[images["label"][i]]
        return {"id": str(images["ids"][i]), "class": name, "IoU": float(images["iou_top1"][i]), "box": box}

    return {"best": [entry(i) for i in order[:LISTED]], "worst": [entry(i) for i in order[::-1][:LISTED]]}


def as_markdown(run: Run, report: dict[str, Any], cost: dict[str, Any], count: int) -> str:
    """report.md: readable alone."""
    identity, centred, threshold = run.identity, report["centred box"], report["threshold"]
    lines = [
        f"# WSOL by CAM: {identity.backbone} ({identity.arch}) on {identity.data}, seed {identity.seed}",
        "",
        f"{count} test images. Scores in per cent; a box is right when its IoU with a true box is above .5.",
        "",
        "| metric | score | chance | best centred box |",
        "|---|---|---|---|",
    ]
    for name, value in report["metrics"].items():
        box = f"{100 * centred[name]:.2f}" if name in centred else ""
        lines.append(f"| {name} | {100 * value:.2f} | {100 * report['chance'][name]:.2f} | {box} |")
    lines += [
        "",
        "Chance: the same predictions, class and box together, shuffled over the images. Best centred box: no image is "
        f"looked at for it; its size was chosen on {centred['chosen on']}; the class is the network's.",
        "",
        f"Threshold {threshold['value']:g} of each map's maximum, {threshold['chosen']}.",
        f"Recipe {identity.recipe}, trained with {run.recipe.method}: {cost['iterations']} iterations, "
        f"{cost['seconds']:.0f} s.",
        "",
        "| IoU, true class's map | images |",
        "|---|---|",
        *(f"| {name} | {number} |" for name, number in report["IoU histogram"].items()),
    ]
    if "curve" in threshold:
        curve = threshold["curve"]
        lines += ["", "| threshold, held-out images | GT-known Loc | mean IoU |", "|---|---|---|"]
        for value, right, mean in zip(curve["threshold"], curve["GT-known Loc"], curve["mean IoU"]):
            lines.append(f"| {value:.2f} | {100 * right:.1f} | {mean:.3f} |")
    for which, entries in report["best and worst"].items():
        lines += ["", f"{which.capitalize()} boxes among images with the right class:", ""]
        lines += [f"- {e['id']} ({e['class']}): IoU {e['IoU']:.3f}" for e in entries]
    return "\n".join([*lines, "", *(f"- {line}" for line in run.notes)])
