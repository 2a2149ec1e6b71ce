"""From score maps to scores: boxes, the threshold's choice, both protocols, the finished cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from backbench.common.base.files import write_text
from backbench.common.data.types import ImageSet
from backbench.common.engine import SPLIT, stream
from backbench.common.metrics import rescore
from backbench.common.metrics.localisation import IOU_RIGHT, best_centred_box, best_iou, shuffled_chance
from backbench.common.report.curve_svg import curve_svg
from backbench.common.run.cell import Run
from backbench.wsol.boxes import boxes_from_maps, from_crop, to_crop
from backbench.wsol.cam import ScoreMaps
from backbench.wsol.choe2020 import (
    Sweep,
    box_statistics,
    centred_box_accuracies,
    curves,
    pixel_truths,
    sweep_maps,
)
from backbench.wsol.drawing import draw_extremes
from backbench.wsol.markdown import as_markdown
from backbench.wsol.recipes import WSOLRecipe

THRESHOLDS = np.arange(1, 20) / 20  # .05, .10 … .95: what a chosen threshold is chosen from
LISTED = 10
SHUFFLED = 500, 5  # images at most, and permutations, for MaxBoxAcc's chance: every one is a whole sweep
Maps = tuple[ScoreMaps, dict[str, np.ndarray]]


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


def choose(recipe: WSOLRecipe, held: Maps | None, held_out: ImageSet | None) -> dict[str, Any]:
    """The recipe's threshold, or the one chosen on held-out training images: "value", "chosen", maybe "curve"."""
    if recipe.threshold:
        return {"value": recipe.threshold, "chosen": "given by the recipe"}
    truths = [to_crop(boxes, recipe.resize, recipe.size) for boxes in held_out.boxes]
    value, curve = choose_threshold(held[0].maps[:, 0], truths, recipe.size)
    chosen = f"on {len(held_out)} training images that were not trained on"
    return {"value": value, "chosen": chosen, "curve": curve}


def finish(
    run: Run,
    tested: Maps,
    test_set: ImageSet,
    threshold: dict[str, Any],
    train_set: ImageSet,
    device: torch.device,
    cost: dict[str, Any],
) -> None:
    """The score stage: boxes from the maps by both protocols, pictures, then the finished cell."""
    recipe: WSOLRecipe = run.recipe
    truths = [to_crop(boxes, recipe.resize, recipe.size) for boxes in test_set.boxes]
    outside = sum(len(truth) == 0 for truth in truths)
    if outside:
        run.note(f"data: {outside} test images have no box inside the crop: counted as not localised")
    known = [to_crop(boxes, recipe.resize, recipe.size) for boxes in train_set.boxes or [] if len(boxes)]
    images, report = measure(tested, test_set, truths, known or truths, threshold["value"], recipe)
    chosen = f"{len(known)} training images" if known else "the scored images themselves"
    report["centred box"] = {"chosen on": chosen, **report["centred box"]}
    report["threshold"] = threshold
    metrics, centred = report["metrics"], report["centred box"]
    run.facts["baselines"] = {
        "best centred box": {name: centred[name] for name in metrics if name in centred}
    }
    report["pictures"] = draw(run, report, images, tested, test_set)
    run.finish(
        metrics=metrics,
        chance=report["chance"],
        primary="Top-1 Loc",
        images=images,
        report=report,
        report_md=as_markdown(run, report, cost, len(test_set)),
        device=device,
        cost=cost,
    )
    print(
        f"Top-1 Loc {100 * metrics['Top-1 Loc']:.1f} % (chance {100 * report['chance']['Top-1 Loc']:.1f}, centred box "
        f"{100 * centred['Top-1 Loc']:.1f}), MaxBoxAccV2 {100 * metrics['MaxBoxAccV2']:.1f} % (centred box "
        f"{100 * centred['MaxBoxAccV2']:.1f}) → {run.folder}"
    )


def measure(
    tested: Maps,
    test_set: ImageSet,
    truths: Sequence[np.ndarray],
    chosen_on: Sequence[np.ndarray],
    threshold: float,
    recipe: WSOLRecipe,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Per-image statistics (images.npz), and the report of both protocols.

    `truths` and `chosen_on` are boxes n × (k, 4) in pixels of the crop: those scored, and those on which the best
    centred box is chosen.
    """
    maps, side, classes = tested[0], recipe.size, len(test_set.classes)
    images, boxes = statistics(*tested, truths, threshold, side)
    centred = best_centred_box(chosen_on, side)
    images["iou_centred"] = best_iou(np.repeat(centred[None], len(truths), 0), truths)
    images["num_classes"] = np.array(classes)
    sweeps = sweep_maps(maps.maps[:, 0])
    images["right_by_grey"] = box_statistics(sweeps, [pixel_truths(truth, side) for truth in truths])
    metrics = {name: float(values[0]) for name, values in rescore("wsol", images).items()}
    rng, predicted = stream(SPLIT, 0), maps.classes[:, 1:6]
    chance = shuffled_chance(
        test_set.labels, truths, predicted, boxes["top1"], boxes["gt"], rng, num_classes=classes
    )
    chance |= shuffled_box_accuracies(sweeps, truths, side, stream(SPLIT, 1))
    images |= {
        "label": test_set.labels.astype(np.int32),
        "predicted": predicted[:, 0],
        "box_top1": from_crop(boxes["top1"], recipe.resize, side).astype(np.float32),
        "box_gt": from_crop(boxes["gt"], recipe.resize, side).astype(np.float32),
    }
    return images, {
        "metrics": metrics,
        "chance": chance,
        "centred box": {
            "box": centred.tolist(),
            **centred_scores(images, metrics, chosen_on, truths, side),
        },
        "choe2020": curves(images["right_by_grey"]),
        "IoU histogram": histogram(images["iou_gt"]),
        "best and worst": extremes(images, test_set, max(LISTED, recipe.pictures)),
    }


def draw(
    run: Run, report: dict[str, Any], images: dict[str, np.ndarray], tested: Maps, test_set: ImageSet
) -> list[str]:
    """Write threshold_curve.svg, best.jpg and worst.jpg into the run folder; the names of those written."""
    sheets = {
        f"{which}.jpg": entries[: run.recipe.pictures]
        for which, entries in report["best and worst"].items()
        if entries[: run.recipe.pictures]
    }
    names = ["threshold_curve.svg", *sheets]
    with run.stage("score", files=names):
        write_text(run.folder / names[0], curve_picture(report, run))
        for name, entries in sheets.items():
            draw_extremes(run.folder / name, entries, images, tested[0].maps, tested[1]["window"], test_set)
    return names


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


def shuffled_box_accuracies(
    sweeps: Sequence[Sweep], truths: Sequence[np.ndarray], side: float, rng: np.random.Generator
) -> dict[str, float]:
    """MaxBoxAcc and MaxBoxAccV2 when every map goes to a random other image; at most SHUFFLED images."""
    most, rounds = SHUFFLED
    part = rng.permutation(len(sweeps))[:most]
    pixels = [pixel_truths(truths[i], side) for i in part]
    zeros = dict.fromkeys(("rank", "iou_gt", "iou_top1"), np.zeros(len(part)))
    scores = []
    for _ in range(rounds):
        shuffled = [sweeps[i] for i in rng.permutation(part)]
        scores.append(rescore("wsol", {**zeros, "right_by_grey": box_statistics(shuffled, pixels)}))
    return {name: float(np.mean([score[name] for score in scores])) for name in ("MaxBoxAcc", "MaxBoxAccV2")}


def centred_scores(
    images: dict[str, np.ndarray],
    metrics: dict[str, float],
    chosen_on: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    side: int,
) -> dict[str, float]:
    """What the best centred box scores: of every metric with a box in it, with the network's class where one counts.

    Its size is chosen anew for each IoU of MaxBoxAccV2, as that protocol chooses the threshold.
    """
    right, rank = images["iou_centred"] > IOU_RIGHT, images["rank"]
    found = {"Top-1 Loc": (right & (rank == 0)).mean(), "GT-known Loc": right.mean()}
    if "Top-5 Loc" in metrics:
        found["Top-5 Loc"] = (right & (rank < 5)).mean()
    shares = centred_box_accuracies(chosen_on, truths, side)
    found |= {"MaxBoxAcc": shares[1], "MaxBoxAccV2": np.mean(shares)}
    return {name: float(value) for name, value in found.items()}


def curve_picture(report: dict[str, Any], run: Run) -> str:
    """threshold_curve.svg: share of images that are right, by threshold; dashed: the paper protocol's threshold."""
    found = report["choe2020"]
    series = [(name, found["threshold"], values) for name, values in found["curves"].items()]
    title = (
        f"Right boxes, % of images: {run.identity.backbone} on {run.identity.data}, seed {run.identity.seed}"
    )
    return curve_svg(title, "threshold, share of the map's range", series, report["threshold"]["value"])


def histogram(overlap: np.ndarray) -> dict[str, int]:
    """Counts of images by IoU in tenths: "0.0–0.1" …"""
    counts, edges = np.histogram(overlap, 10, (0, 1))
    return {f"{low:.1f}–{high:.1f}": int(count) for low, high, count in zip(edges, edges[1:], counts)}


def extremes(images: dict[str, np.ndarray], test_set: ImageSet, most: int) -> dict[str, list[dict[str, Any]]]:
    """The images localised best and worst among those with the right class."""
    right = np.flatnonzero(images["rank"] == 0)
    order = right[np.argsort(-images["iou_top1"][right], kind="stable")]

    def entry(i: int) -> dict[str, Any]:
        box = [round(float(x), 4) for x in images["box_top1"][i]]
        name = test_set.classes[images["label"][i]]
        return {"id": str(images["ids"][i]), "class": name, "IoU": float(images["iou_top1"][i]), "box": box}

    return {"best": [entry(i) for i in order[:most]], "worst": [entry(i) for i in order[::-1][:most]]}
