"""SSD's matching, hard-negative mining and NMS of a batch against the loops of the field, on one core or a GPU.

    python tests/benchmarks/bench_matching.py [--batch 32] [--rounds 7] [--device cpu] [--json FILE]

Peers, written again here: ssd.pytorch's `match` called image after image; its mining, two full sorts (`rank` of
a rank); NMS called for each image and class. Results are compared before anything is timed. The sides take turns,
the fastest round of each counts. On a GPU matching and mining also run under
`torch.cuda.set_sync_debug_mode("error")`: they must not wait for the device.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import numpy as np
import torch
from torchvision.ops import box_iou, nms

from backbench.detection.matching import corners, decode, encode, hard_negatives, match_priors, ssd300_priors
from backbench.detection.ssd import detect


def match_loop(boxes, labels, priors):
    """ssd.pytorch's match, one image at a time."""
    targets, classes = [], []
    for box, label in zip(boxes, labels):
        box, label = box[label >= 0], label[label >= 0]
        overlaps = box_iou(box, corners(priors))
        best_prior = overlaps.max(1).indices
        best_overlap, best_truth = overlaps.max(0)
        best_overlap.index_fill_(0, best_prior, 2)
        for k in range(len(best_prior)):
            best_truth[best_prior[k]] = k
        conf = label[best_truth] + 1
        conf[best_overlap < 0.5] = 0
        targets.append(encode(box[best_truth], priors))
        classes.append(conf)
    return torch.stack(targets), torch.stack(classes)


def mine_by_two_sorts(loss, positive):
    """ssd.pytorch's mining: the rank of each prior's loss by two sorts."""
    loss = loss.masked_fill(positive, 0)
    _, order = loss.sort(1, descending=True)
    _, rank = order.sort(1)
    count = torch.clamp(3 * positive.long().sum(1, keepdim=True), max=positive.size(1) - 1)
    return rank < count


def nms_loop(offsets, logits, priors):
    """One NMS an image and class, as ssd.pytorch's Detect."""
    found = []
    for offset, logit in zip(offsets, logits):
        boxes, scores = decode(offset, priors).clamp(0, 1), logit.softmax(-1)
        kept = []
        for c in range(1, scores.shape[1]):
            index = torch.nonzero(scores[:, c] > 0.01)[:, 0]
            if len(index):
                index = index[scores[index, c].topk(min(400, len(index))).indices]
                keep = index[nms(boxes[index], scores[index, c], 0.45)]
                kept.append((boxes[keep], scores[keep, c]))
        all_scores = torch.cat([s for _, s in kept])
        found.append(all_scores.sort(descending=True).values[:200])
    return found


def make(batch: int, device: str):
    """Truth of VOC's density (1 to 8 objects), losses and predictions."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    low = rng.uniform(0, 0.6, (batch, 8, 2))
    boxes = torch.from_numpy(np.concatenate([low, low + rng.uniform(0.05, 0.4, (batch, 8, 2))], 2)).float()
    labels = torch.from_numpy(rng.integers(0, 20, (batch, 8)))
    for row, count in zip(labels, rng.integers(1, 9, batch)):
        row[count:] = -1
    loss = torch.rand(batch, 8732, generator=generator)
    offsets = torch.randn(batch, 8732, 4, generator=generator)
    logits = torch.randn(batch, 8732, 21, generator=generator)
    logits[..., 0] += 8  # above .01 are about a thousand of an image
    near = torch.rand(batch, 8732, 1, generator=generator) < 0.01
    logits[..., 1:] += near * 5 * (torch.rand(batch, 8732, 20, generator=generator) < 0.1)
    return [x.to(device) for x in (boxes, labels, loss, offsets, logits)]


def main() -> None:
    """Compare, then time the sides in turn and print milliseconds and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    boxes, labels, loss, offsets, logits = make(args.batch, args.device)
    priors = ssd300_priors().to(args.device)
    (targets, classes), (other, others) = (
        match_priors(boxes, labels, priors),
        match_loop(boxes, labels, priors),
    )
    positive = classes > 0
    assert torch.equal(classes, others) and torch.equal(targets[positive], other[positive])
    assert torch.equal(hard_negatives(loss, positive), mine_by_two_sorts(loss, positive))
    batched = [one["scores"] for one in detect(offsets, logits, priors)]
    assert all(torch.equal(a, b) for a, b in zip(batched, nms_loop(offsets, logits, priors)))
    if args.device != "cpu":
        torch.cuda.set_sync_debug_mode("error")
        hard_negatives(loss, match_priors(boxes, labels, priors)[1] > 0)
        torch.cuda.set_sync_debug_mode("default")
    pairs = {
        "matching": (
            lambda: match_priors(boxes, labels, priors),
            lambda: match_loop(boxes, labels, priors),
        ),
        "mining": (lambda: hard_negatives(loss, positive), lambda: mine_by_two_sorts(loss, positive)),
        "NMS": (lambda: detect(offsets, logits, priors), lambda: nms_loop(offsets, logits, priors)),
    }
    best = {(name, side): float("inf") for name in pairs for side in (0, 1)}
    for _ in range(args.rounds):
        for name, sides in pairs.items():
            for side, run in enumerate(sides):
                best[name, side] = min(best[name, side], timed(run, args.device))
    result = {"batch": args.batch, "device": args.device, "rounds": args.rounds}
    for name in pairs:
        ours, theirs = (1000 * best[name, side] for side in (0, 1))
        result[name] = {"ours_ms": ours, "loop_ms": theirs, "ratio": theirs / ours}
        print(f"{name:9} ours {ours:8.2f} ms   loop {theirs:8.2f} ms   {theirs / ours:5.2f} ×")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def timed(run, device: str) -> float:
    """Seconds of one call."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
