"""Time of 1,000 paired replicates of every metric, for cells of full size: VOC07 test, COCO captions, CUB, ImageNet.

Synthetic cells: 4,952 images with 200 detections each over 20 classes (COCO marks too), 40,504 images × 5 captions,
5,794 images for localisation by both protocols, 50,000 for classification. A pair is two backbones under the same
draws. The peer is the usual way, a metric computed anew on every resample, of which a few are timed: a plain bootstrap
of 1,000 would take 1,000 times one evaluation.

    python tests/benchmarks/bench_board.py [--replicates 1000] [--share 1.0] [--json FILE]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from backbench.common.board.statistics import draw_weights
from backbench.common.metrics import rescore
from backbench.common.metrics.localisation import pack_right


def detection(rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    """Statistics as `average_precision.match` and `coco.match` leave them."""
    n, classes, each = round(4952 * share), 20, 200
    total = n * each
    label = np.sort(rng.integers(0, classes, total)).astype(np.int16)
    score = rng.random(total, np.float32)
    order = np.lexsort((-score, label))
    right = rng.random(total) < 0.012
    marks = (rng.random((total, 1, 10)) < np.linspace(0.9, 0.2, 10)) & right[:, None, None]
    return {
        "image": rng.integers(0, n, total).astype(np.int32),
        "label": label[order],
        "score": score[order],
        "mark": right.astype(np.int8),
        "positives": rng.poisson(2.4 / classes, (n, classes)).astype(np.int32),
        "coco_mark": marks.astype(np.int8),
    }


def captioning(rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    """Statistics as `captions.statistics` leaves them, with METEOR's."""
    n = round(40504 * share)
    lengths = rng.integers(8, 14, (n, 2))
    matches = np.minimum(rng.integers(0, 10, (n, 4)), np.maximum(0, lengths[:, :1] - np.arange(4)))
    return {
        "bleu_lengths": lengths,
        "bleu_matches": -np.sort(-matches, 1),
        "rouge": rng.random(n),
        "cider": rng.exponential(0.7, n),
        "meteor": rng.integers(0, 9, (n, 23)).astype(float),
    }


def wsol(rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    """Statistics of both localisation protocols."""
    n = round(5794 * share)
    return {
        "rank": rng.integers(0, 9, n),
        "iou_top1": rng.random(n),
        "iou_gt": rng.random(n),
        "num_classes": np.array(200),
        "right_by_grey": pack_right(rng.random((n, 4, 255)) < 0.5),
    }


def classification(rng: np.random.Generator, share: float) -> dict[str, np.ndarray]:
    """Ranks of the true class."""
    return {"rank": rng.geometric(0.7, round(50000 * share)) - 1, "num_classes": np.array(1000)}


ROOMS = {"detection": detection, "captioning": captioning, "wsol": wsol, "classification": classification}
IMAGES = {"detection": "positives", "captioning": "rouge", "wsol": "rank", "classification": "rank"}


def main() -> None:
    """Time every task's pair and print a line each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--share", type=float, default=1.0, help="of the full size")
    parser.add_argument("--tasks", nargs="+", default=list(ROOMS), choices=list(ROOMS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    for task in args.tasks:
        rng = np.random.default_rng(0)
        pair = [ROOMS[task](rng, args.share) for _ in range(2)]
        n = len(pair[0][IMAGES[task]])
        start = time.perf_counter()
        for weights in draw_weights(n, args.replicates, np.random.default_rng([0, n])):
            values = [rescore(task, images, weights) for images in pair]
        ours = time.perf_counter() - start
        start = time.perf_counter()
        for images in pair:
            rescore(task, images, None)
        once = time.perf_counter() - start
        names = ", ".join(values[0])
        found[task] = {"images": n, "seconds": ours, "one evaluation": once, "metrics": names}
        line = f"{task}: {n} images, {args.replicates} paired replicates of {names}: {ours:.1f} s"
        print(
            f"{line}; one pair of evaluations {once:.2f} s, so a loop {args.replicates * once:.0f} s",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
