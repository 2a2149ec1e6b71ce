"""Average precision: half a million detections against the usual loop, and a thousand resampled mAPs.

    python tests/benchmarks/bench_map.py [--detections 500000] [--near 0.25] [--rounds 5] [--json FILE]

The peer is the loop of py-faster-rcnn and ssd.pytorch, written anew: for each class the detections in falling score,
for each of them NumPy's overlaps with the objects of its image and class. Both get the same arrays of a synthetic set
of VOC2007 test's size (4,952 images, 20 classes, 12,032 objects), and must agree exactly. Runs are interleaved on one
thread; the least of each is taken. COCO AP is timed against pycocotools on a tenth of it.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from backbench.common.base.files import write_json
from backbench.common.metrics import average_precision, coco
from backbench.common.metrics.average_precision import RECALLS, Boxes

IMAGES, CLASSES, OBJECTS = 4952, 20, 12032
DRAWS = 1000


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--detections", type=int, default=500_000)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument(
        "--near", type=float, default=0.25, help="share of detections near an object: the loop's work"
    )
    made.add_argument("--json", type=Path)
    args = made.parse_args()
    rng = np.random.default_rng(0)
    found, truth = synthetic(rng, args.detections, IMAGES, OBJECTS, args.near)
    times: dict[str, list[float]] = {"loop": [], "arrays": []}
    for _ in range(args.rounds):
        start = time.perf_counter()
        peer = loop_map(found, truth)
        times["loop"].append(time.perf_counter() - start)
        start = time.perf_counter()
        stats = average_precision.match(found, truth, IMAGES, CLASSES, iou=0.5)
        ours = average_precision.rescore(stats)
        times["arrays"].append(time.perf_counter() - start)
    if peer != (ours["mAP"][0], ours["mAP_area"][0]):
        raise SystemExit(f"they differ: {peer} and {ours}")
    loop, arrays = min(times["loop"]), min(times["arrays"])
    figures = {
        "detections": args.detections,
        "mAP": float(ours["mAP"][0]),
        "loop_s": loop,
        "arrays_s": arrays,
        "ratio": loop / arrays,
    }
    print(
        f"mAP of {args.detections:,} detections: loop {loop:.2f} s, arrays {arrays:.2f} s: {loop / arrays:.1f} ×"
    )

    figures |= resampled(stats, "mAP and mAP_area", "resampled_s", average_precision.rescore, rng)
    marks = {**stats, **coco.match(found, truth, IMAGES, CLASSES, sizes=[coco.SIZES["all"]])}
    figures |= resampled(marks, "AP, AP50 and AP75", "resampled_coco_s", coco.rescore, rng)
    figures |= against_pycocotools(rng, args.detections // 10)
    if args.json:
        write_json(args.json, figures)


def resampled(stats, names, key, rescore, rng) -> dict[str, float]:
    """Seconds of DRAWS resamplings of the images, in blocks as the board draws them."""
    start = time.perf_counter()
    for _ in range(DRAWS // 50):
        rescore(stats, rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 50))
    seconds = time.perf_counter() - start
    print(f"{DRAWS:,} image-resampled {names}: {seconds:.1f} s on one core")
    return {key: seconds}


def synthetic(
    rng: np.random.Generator, k: int, images: int, objects: int, share: float = 0.25
) -> tuple[Boxes, Boxes]:
    """A `share` of the detections near an object of their class, the nearer the surer, the rest anywhere."""

    def anywhere(count: int) -> np.ndarray:
        corner = rng.uniform(0, 400, (count, 2))
        return np.concatenate([corner, corner + rng.uniform(20, 200, (count, 2))], 1)

    truth = Boxes(
        *(rng.integers(0, images, objects), rng.integers(0, CLASSES, objects), anywhere(objects)),
        difficult=rng.random(objects) < 0.12,
    )
    box, label, image = anywhere(k), rng.integers(0, CLASSES, k), rng.integers(0, images, k)
    near = rng.random(k) < share
    like, off = rng.integers(0, objects, k), rng.uniform(0, 60, k)
    box[near] = truth.box[like[near]] + rng.normal(0, 1, (int(near.sum()), 4)) * off[near, None]
    label[near], image[near] = truth.label[like[near]], truth.image[like[near]]
    box[:, 2:] = np.maximum(box[:, 2:], box[:, :2] + 1)
    score = np.clip(np.where(near, 0.9 - off / 80, 0.15) + rng.normal(0, 0.1, k), 0, 1).round(6)
    order = np.lexsort((-score, image))
    return Boxes(image[order], label[order], box[order], score=score[order]), truth


def loop_map(found: Boxes, truth: Boxes) -> tuple[float, float]:
    """mAP by 11 points and by area, a detection at a time."""
    eleven, area = [], []
    for c in range(CLASSES):
        mine = truth.label == c
        objects: dict[int, list[int]] = {}
        for t, i in zip(np.flatnonzero(mine).tolist(), truth.image[mine].tolist()):
            objects.setdefault(i, []).append(t)
        records = {
            i: (truth.box[rows], truth.difficult[rows], np.zeros(len(rows), bool))
            for i, rows in objects.items()
        }
        total = int((mine & ~truth.difficult).sum())
        rows = np.flatnonzero(found.label == c)
        rows = rows[np.argsort(-found.score[rows].astype(np.float32), kind="stable")]
        images, boxes = found.image[rows].tolist(), found.box[rows]
        tp, fp = np.zeros(len(rows)), np.zeros(len(rows))
        for d in range(len(rows)):
            record = records.get(images[d])
            if record is None:
                fp[d] = 1
                continue
            box, theirs = boxes[d], record[0]
            w = np.minimum(theirs[:, 2], box[2]) - np.maximum(theirs[:, 0], box[0])
            h = np.minimum(theirs[:, 3], box[3]) - np.maximum(theirs[:, 1], box[1])
            inter = np.maximum(w, 0.0) * np.maximum(h, 0.0)
            union = (
                (box[2] - box[0]) * (box[3] - box[1])
                + (theirs[:, 2] - theirs[:, 0]) * (theirs[:, 3] - theirs[:, 1])
                - inter
            )
            overlap = inter / union
            best = np.argmax(overlap)
            if overlap[best] < 0.5:
                fp[d] = 1
            elif not record[1][best]:
                tp[d], fp[d] = not record[2][best], record[2][best]
                record[2][best] = True
        tp, fp = np.cumsum(tp), np.cumsum(fp)
        recall, precision = tp / total, np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp + fp > 0)
        points = 0.0
        for t in RECALLS:
            points += max(precision[recall >= t], default=0.0) / 11.0
        eleven.append(points)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        area.append(float(np.cumsum(np.diff(recall, prepend=0.0) * precision)[-1]))
    return sum(eleven) / CLASSES, sum(area) / CLASSES


def against_pycocotools(rng: np.random.Generator, k: int) -> dict[str, float]:
    """Seconds of pycocotools' and of our AP, APs, APm, APl of the same detections."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = max(1, k * IMAGES // 500_000)
    found, truth = synthetic(rng, k, images, max(1, k * OBJECTS // 500_000))

    def entries(boxes: Boxes, more: dict) -> list[dict]:
        flat = np.hstack([boxes.box[:, :2], boxes.box[:, 2:] - boxes.box[:, :2]]).tolist()
        return [
            {"id": n + 1, "image_id": int(i), "category_id": int(c), "bbox": b, "area": b[2] * b[3], **values}
            for n, (i, c, b, values) in enumerate(zip(boxes.image, boxes.label, flat, more))
        ]

    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(images)],
            "categories": [{"id": c, "name": str(c)} for c in range(CLASSES)],
            "annotations": entries(truth, [{"iscrowd": int(d)} for d in truth.difficult]),
        }
        theirs.createIndex()
        results = theirs.loadRes(entries(found, [{"score": float(s)} for s in found.score]))
        start = time.perf_counter()
        judge = COCOeval(theirs, results, "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
        slow = time.perf_counter() - start
    start = time.perf_counter()
    ours = coco.strata(coco.match(found, truth, images, CLASSES))
    fast = time.perf_counter() - start
    if not np.allclose(judge.stats[[0, 3, 4, 5]], list(ours.values()), rtol=0, atol=1e-9):
        raise SystemExit(f"they differ: {judge.stats[:6]} and {ours}")
    print(f"COCO AP of {k:,} detections: pycocotools {slow:.2f} s, arrays {fast:.2f} s: {slow / fast:.1f} ×")
    return {"pycocotools_s": slow, "coco_s": fast, "coco_ratio": slow / fast}


if __name__ == "__main__":
    main()
