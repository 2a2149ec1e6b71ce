"""A classifier's evaluation: scores, what chance gives, classes, confusions, calibration; the report and the cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from backbench.common.base.errors import UserError
from backbench.common.engine import SPLIT, stream
from backbench.common.metrics import rescore
from backbench.common.metrics.classification import true_rank
from backbench.common.run.cell import Run

SHOWN = 50  # classes, and 10 confusions, that the Markdown report lists


def evaluate(
    logits: np.ndarray, labels: np.ndarray, ids: Sequence[str], classes: Sequence[str]
) -> dict[str, Any]:
    """All numbers of a classifier's logits (n, C) on images with labels (n,), indices into the C `classes`.

    "images": the per-image statistics; "metrics" and "chance" (the same predictions, shuffled over the images):
    fractions; "by class": top-1 of each class that has images; "confusions": (true, predicted, images), most frequent
    first; "calibration error": mean |confidence − accuracy| over 15 bins of equal width, weighted by their images
    (Guo et al., 2017). Raises UserError naming the image of a logit that is not finite.
    """
    bad = ~np.isfinite(logits).all(1)
    if bad.any():
        raise UserError(
            f"image {ids[bad.argmax()]}: its logits are not finite ({bad.sum()} of {len(bad)} images); the weights are "
            "broken: train again with a lower rate (--restart --set lr=…)"
        )
    rank = true_rank(logits, labels)
    shared = {"ids": np.array(ids), "num_classes": np.array(logits.shape[1])}
    statistics = {**shared, "rank": rank.astype(np.int16)}
    shuffled = stream(SPLIT, 0).permutation(len(logits))
    chance = {**shared, "rank": true_rank(logits[shuffled], labels)}
    predicted = logits.argmax(1)
    wrong = predicted != labels
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:10]
    return {
        "images": statistics,
        "metrics": {k: float(v[0]) for k, v in rescore("classification", statistics).items()},
        "chance": {k: float(v[0]) for k, v in rescore("classification", chance).items()},
        "by class": {
            name: float((rank[labels == i] == 0).mean())
            for i, name in enumerate(classes)
            if (labels == i).any()
        },
        "confusions": [(classes[a], classes[b], int(n)) for (a, b), n in zip(pairs[order], counts[order])],
        "calibration error": calibration_error(logits, labels),
    }


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of softmax confidences: logits (n, C), labels (n,) → a fraction."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    confidence = shifted.max(1) / shifted.sum(1)
    right = logits.argmax(1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(which, confidence - right, bins)
    return float(np.abs(gap).sum() / len(labels))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share observed on `count` images: what other test images could have given."""
    z2 = 1.959964**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return float(centre - half), float(centre + half)


def finish(
    run: Run, found: dict[str, Any], device: torch.device, cost: dict[str, Any], lines: list[str]
) -> None:
    """Write the report and the cell of what `evaluate` found; `lines` say how the classifier came about."""
    metrics, chance, count = found["metrics"], found["chance"], len(found["images"]["ids"])
    table = []
    for name, value in metrics.items():
        low, high = (100 * bound for bound in wilson(value, count))
        table.append(f"| {name} | {100 * value:.2f} | {low:.2f} to {high:.2f} | {100 * chance[name]:.2f} |")
    worst = sorted(found["by class"].items(), key=lambda item: item[1])
    left_out = f" ({SHOWN} lowest of {len(worst)})" if len(worst) > SHOWN else ""
    text = [
        f"# {run.identity.backbone}: {run.identity.arch} on {run.identity.data}, seed {run.identity.seed}",
        "",
        "| metric | score | 95 % interval | chance |",
        "|---|---|---|---|",
        *table,
        "",
        *lines,
        "",
        f"{count} test images; the interval is over test images alone (Wilson's). Chance: the same predictions, "
        f"shuffled over the images. Calibration error (15 bins): {100 * found['calibration error']:.1f} %.",
        "",
        f"| class{left_out} | top-1 |",
        "|---|---|",
        *(f"| {name} | {100 * value:.1f} |" for name, value in worst[:SHOWN]),
    ]
    if found["confusions"]:
        text += ["", "| true | taken for | images |", "|---|---|---|"]
        text += [f"| {true} | {taken} | {number} |" for true, taken, number in found["confusions"]]
    text += ["", *(f"- {line}" for line in run.notes)]
    run.finish(
        metrics=metrics,
        chance=chance,
        primary="top-1",
        images=found["images"],
        report={k: v for k, v in found.items() if k != "images"},
        report_md="\n".join(text),
        device=device,
        cost=cost,
    )
