"""VOC AP against a plain loop over detections, on cases made to be nasty."""

import numpy as np
import pytest

from backbench.common.metrics.average_precision import (
    IGNORED,
    PRESETS,
    RIGHT,
    WRONG,
    Boxes,
    Convention,
    as_printed,
    class_ap,
    match,
    rescore,
)


def loop_ap(found, truth, image_weights, c, iou, inclusive, plus_one):
    """(11-point AP, area AP) of one class, one detection after the other; None without objects."""
    one = 1.0 if plus_one else 0.0
    objects = sum(
        image_weights[i] for i, k, d in zip(truth.image, truth.label, truth.difficult) if k == c and not d
    )
    if objects == 0:
        return None
    rows = [r for r in range(len(found.image)) if found.label[r] == c]
    rows.sort(key=lambda r: -found.score[r])
    claimed, tp, fp, curve = set(), 0.0, 0.0, []
    for r in rows:
        best, overlap = None, -1.0
        for t in range(len(truth.image)):
            if truth.image[t] != found.image[r] or truth.label[t] != c:
                continue
            a, b = (np.asarray(x.box, float)[k] for x, k in ((found, r), (truth, t)))
            w = min(a[2], b[2]) - max(a[0], b[0]) + one
            h = min(a[3], b[3]) - max(a[1], b[1]) + one
            inter = w * h if w > 0 and h > 0 else 0.0
            area = (
                (a[2] - a[0] + one) * (a[3] - a[1] + one) + (b[2] - b[0] + one) * (b[3] - b[1] + one) - inter
            )
            value = inter / area if area > 0 else 0.0
            if value > overlap:
                best, overlap = t, value
        weight = image_weights[found.image[r]]
        if best is not None and (overlap >= iou if inclusive else overlap > iou):
            if truth.difficult[best]:
                continue
            if best in claimed:
                fp += weight
            else:
                claimed.add(best)
                tp += weight
        else:
            fp += weight
        curve.append((tp / objects, tp / (tp + fp) if tp + fp > 0 else 0.0))
    eleven = 0.0
    for t in np.arange(0, 1.1, 0.1):
        eleven += max([p for r, p in curve if r >= t], default=0.0) / 11.0
    area, before = 0.0, 0.0
    for k, (recall, _) in enumerate(curve):
        area += (recall - before) * max(p for _, p in curve[k:])
        before = recall
    return eleven, area


def random_case(rng, images=4, classes=3):
    """Boxes on a coarse grid, so that IoU is often exactly .5, overlaps tie and scores tie."""

    def boxes(k):
        corner = rng.integers(0, 4, (k, 2))
        return np.concatenate([corner, corner + rng.integers(1, 4, (k, 2))], 1).astype(float)

    k, t = rng.integers(0, 60), rng.integers(0, 20)
    truth = Boxes(
        rng.integers(0, images, t), rng.integers(0, classes, t), boxes(t), difficult=rng.random(t) < 0.3
    )
    found = Boxes(
        rng.integers(0, images, k), rng.integers(0, classes, k), boxes(k), score=rng.integers(1, 8, k) / 8
    )
    return found, truth


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("plus_one", [True, False])
def test_equals_the_loop_exactly(inclusive, plus_one):
    rng, matched = np.random.default_rng(0), 0
    for case in range(120):
        found, truth = random_case(rng)
        iou = [0.5, 0.5, 0.3, 0.75, 0.05, 1.0][case % 6]
        stats = match(found, truth, 4, 3, iou, Convention(inclusive, plus_one))
        weights = np.concatenate([np.ones((1, 4)), rng.multinomial(4, np.full(4, 1 / 4), 3)])
        ap = class_ap(stats, weights)
        means = rescore(stats, weights)
        for r, row in enumerate(weights):
            loop = [loop_ap(found, truth, row.astype(float), c, iou, inclusive, plus_one) for c in range(3)]
            for c, expected in enumerate(loop):
                got = ap["AP"][r, c], ap["AP_area"][r, c]
                assert np.isnan(got).all() if expected is None else got == expected
            kept = [value for value in loop if value is not None]
            for k, name in enumerate(("mAP", "mAP_area")):
                assert (
                    means[name][r] == sum(v[k] for v in kept) / len(kept)
                    if kept
                    else np.isnan(means[name][r])
                )
        matched += int((stats["mark"] == RIGHT).sum())
    assert matched > 60


def one_image(found, scores, truth, difficult):
    zeros = np.zeros
    return (
        Boxes(
            zeros(len(found), int),
            zeros(len(found), int),
            np.array(found, float).reshape(-1, 4),
            np.array(scores),
        ),
        Boxes(
            zeros(len(truth), int),
            zeros(len(truth), int),
            np.array(truth, float).reshape(-1, 4),
            difficult=np.array(difficult, bool),
        ),
    )


def test_duplicates_and_ties_in_given_order():
    found, truth = one_image([[0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]], [0.5, 0.5, 0.9], [[0, 0, 2, 2]], [0])
    stats = match(found, truth, 1, 1)
    assert stats["mark"].tolist() == [WRONG, RIGHT, WRONG]
    assert rescore(stats)["mAP"][0] == pytest.approx(0.5)


def test_scores_that_float32_cannot_tell_apart():
    found, truth = one_image([[5, 5, 6, 6], [0, 0, 2, 2]], [1 - 2e-9, 1 - 1e-9], [[0, 0, 2, 2]], [0])
    assert match(found, truth, 1, 1)["mark"].tolist() == [RIGHT, WRONG]


def test_iou_exactly_half():
    found, truth = one_image([[0, 0, 2, 1]], [0.9], [[0, 0, 1, 1]], [0])
    assert match(found, truth, 1, 1)["mark"].tolist() == [RIGHT]
    assert match(found, truth, 1, 1, convention=Convention(inclusive=False))["mark"].tolist() == [WRONG]
    found, truth = one_image(
        [[0, 0, 1, 0]], [0.9], [[0, 0, 0, 0]], [0]
    )  # the same pixels as inclusive indices
    assert match(found, truth, 1, 1, convention=Convention(plus_one=True))["mark"].tolist() == [RIGHT]


def test_difficult_is_neither_right_nor_wrong():
    found, truth = one_image(
        [[0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6]], [0.9, 0.8, 0.7], [[0, 0, 2, 2], [4, 4, 6, 6]], [1, 0]
    )
    stats = match(found, truth, 1, 1)
    assert stats["mark"].tolist() == [IGNORED, IGNORED, RIGHT]
    assert stats["positives"].tolist() == [[1]]
    assert rescore(stats)["mAP"][0] == pytest.approx(1.0, abs=1e-15)
    truth.difficult[:] = True
    assert np.isnan(rescore(match(found, truth, 1, 1))["mAP"][0])


def test_classes_without_objects_are_left_out_and_misses_are_zero():
    found, truth = one_image([], [], [[0, 0, 2, 2]], [0])
    assert rescore(match(found, truth, 1, 1))["mAP"].tolist() == [0.0]
    assert rescore(match(found, truth, 1, 5))["mAP_area"].tolist() == [0.0]
    found, truth = one_image([[0, 0, 2, 2]], [0.9], [[0, 0, 2, 2]], [0])
    assert rescore(match(found, truth, 1, 5))["mAP_area"].tolist() == [1.0]
    found, truth = one_image([[0, 0, 2, 2]], [0.9], [], [])
    assert np.isnan(rescore(match(found, truth, 1, 2))["mAP"]).all()


def test_a_weight_of_zero_is_the_image_removed():
    found, truth = random_case(np.random.default_rng(3))

    def without(boxes, gone):
        keep = boxes.image != gone
        parts = {k: getattr(boxes, k) for k in ("image", "label", "box", "score", "difficult")}
        return Boxes(**{k: None if v is None else v[keep] for k, v in parts.items()})

    for gone in range(4):
        removed = class_ap(match(without(found, gone), without(truth, gone), 4, 3))
        weighted = class_ap(match(found, truth, 4, 3), 2.0 * (np.arange(4) != gone)[None])
        np.testing.assert_array_equal(weighted["AP"], removed["AP"])
        np.testing.assert_array_equal(weighted["AP_area"], removed["AP_area"])


def test_presets():
    found, truth = one_image([[10, 10, 20, 20]], [0.9], [[10, 10, 20, 20]], [0])
    for preset in PRESETS.values():
        assert match(found, truth, 1, 1, convention=preset)["mark"].tolist() == [RIGHT]
    # ssd.pytorch evaluates (11, 11, 20, 20) against (10, 10, 19, 19) with plain sizes: IoU 64 / 98
    assert match(found, truth, 1, 1, 64 / 98 - 1e-9, PRESETS["ssd.pytorch"])["mark"].tolist() == [RIGHT]
    assert match(found, truth, 1, 1, 64 / 98 + 1e-9, PRESETS["ssd.pytorch"])["mark"].tolist() == [WRONG]
    found.score = np.array([0.12345])
    assert match(found, truth, 1, 1, convention=PRESETS["detectron2"])["score"].tolist() == [
        np.float32(0.123)
    ]


def text_file_ap(found, truth, names, c, preset):
    """11-point AP of class c as the named tool has it: result lines printed, read back and judged one by one."""
    one = {"py-faster-rcnn": 1, "detectron2": 1, "ssd.pytorch": 0}[preset]
    lines = []
    for r in np.flatnonzero(found.label == c):
        x0, y0, x1, y1 = found.box[r]
        corners = f"{x0 + 1:.1f} {y0 + 1:.1f} {x1:.1f} {y1:.1f}"  # 1-based and inclusive
        lines.append(f"{names[found.image[r]]} {found.score[r]:.3f} {corners}")
    objects = {}
    for t in np.flatnonzero(truth.label == c):
        x0, y0, x1, y1 = truth.box[t]
        corners = np.array([x0 + 1, y0 + 1, x1, y1]) - (preset == "ssd.pytorch")
        objects.setdefault(names[truth.image[t]], []).append((corners, truth.difficult[t]))
    total = sum(not hard for listed in objects.values() for _, hard in listed)
    if not total:
        return None
    rows = sorted((line.split() for line in lines), key=lambda parts: -float(parts[1]))
    used, tp, points = set(), 0, []
    fp = 0
    for name, _, *corners in rows:
        b, best, place = [float(v) for v in corners], -np.inf, None
        for k, (g, hard) in enumerate(objects.get(name, [])):
            w, h = min(b[2], g[2]) - max(b[0], g[0]) + one, min(b[3], g[3]) - max(b[1], g[1]) + one
            inter = max(w, 0.0) * max(h, 0.0)
            sides = [(v[2] - v[0] + one) * (v[3] - v[1] + one) for v in (b, g)]
            iou = inter / (sides[0] + sides[1] - inter)
            if iou > best:
                best, place = iou, (name, k, hard)
        if best > 0.5:
            if place[2]:
                continue
            tp, fp = (tp, fp + 1) if place in used else (tp + 1, fp)
            used.add(place)
        else:
            fp += 1
        points.append((tp / total, tp / (tp + fp)))
    ap = 0.0
    for t in np.arange(0, 1.1, 0.1):
        ap += max([p for r, p in points if r >= t], default=0.0) / 11.0
    return ap


@pytest.mark.parametrize("preset", ["py-faster-rcnn", "detectron2", "ssd.pytorch"])
def test_presets_equal_their_tools_on_text_files(preset):
    rng, scored, moved = np.random.default_rng(7), 0, 0
    for _ in range(60):
        found, truth = random_case(rng)
        found.box, truth.box = 10 * found.box, 10 * truth.box
        like = rng.integers(0, max(1, len(truth.box)), len(found.box))
        if len(truth.box):
            found.box = truth.box[like].copy()
            found.box[:, 2] -= rng.choice([0, 0.5], len(like)) * (found.box[:, 2] - found.box[:, 0])  # IoU .5
            found.box += rng.choice([0, 0.05, 0.15, -0.05, 1], found.box.shape)  # halves of a printed decimal
            found.image, found.label = truth.image[like], truth.label[like]
        found.score = rng.integers(1, 4000, len(found.box)) / 4000
        stats = match(found, truth, 4, 3, convention=PRESETS[preset])
        plain = class_ap(match(found, truth, 4, 3))["AP"][0]
        for c, value in enumerate(class_ap(stats)["AP"][0]):
            expected = text_file_ap(found, truth, ["a", "b", "c", "d"], c, preset)
            assert np.isnan(value) if expected is None else value == expected
            scored += expected is not None
            moved += expected is not None and value != plain[c]
    assert scored > 100 and moved > 10


def test_printed_decimals():
    values = np.concatenate([np.arange(0, 400) / 20, np.random.default_rng(0).uniform(-5, 500, 2000)])
    for digits in (1, 3):
        assert as_printed(values, digits).tolist() == [float(f"{v:.{digits}f}") for v in values.tolist()]
    assert as_printed(np.array([12.35, 0.25]), 1).tolist() == [12.3, 0.2]
