"""IoU, WSOL scores and accuracies against test vectors, torchvision and plain loops."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from backbench.common.metrics import classification, localisation


def random_boxes(rng, n, side=20):
    corners = np.sort(rng.integers(0, side + 1, (n, 2, 2)), 1)
    return corners.reshape(n, 4).astype(float)


def test_iou_test_vectors():
    first, second = np.array([1, 2, 5, 6]), np.array([3, 1, 4, 5])
    assert localisation.iou(first, second) == 3 / 17
    assert localisation.iou(first, second, plus_one=True) == 8 / 27


def test_iou_equals_torchvision():
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 30), random_boxes(rng, 40) + 0.25
    expected = box_iou(torch.from_numpy(first), torch.from_numpy(second)).nan_to_num().numpy()
    np.testing.assert_allclose(localisation.iou(first[:, None], second[None]), expected, atol=1e-15)


def test_iou_without_area_is_zero():
    empty = np.zeros(4)
    assert localisation.iou(empty, empty) == 0
    assert localisation.iou(empty, np.array([0, 0, 5, 5])) == 0
    assert localisation.iou(np.array([0, 0, 2, 2]), np.array([2, 0, 4, 2])) == 0  # they only touch


def test_best_iou_is_the_best_of_an_images_boxes():
    rng = np.random.default_rng(1)
    boxes = random_boxes(rng, 50)
    truths = [random_boxes(rng, rng.integers(0, 4)) for _ in boxes]
    expected = [max((float(localisation.iou(b, t)) for t in ts), default=0.0) for b, ts in zip(boxes, truths)]
    np.testing.assert_array_equal(localisation.best_iou(boxes, truths), expected)
    assert localisation.best_iou(np.zeros((2, 4)), [np.zeros((0, 4))] * 2).tolist() == [0, 0]


def test_iou_of_exactly_half_is_wrong():
    boxes = np.array([[0.0, 0, 10, 5]])
    overlap = localisation.best_iou(boxes, [np.array([[0.0, 0, 10, 10]])])
    assert overlap == 0.5
    images = {"rank": np.zeros(1, int), "iou_top1": overlap, "iou_gt": overlap}
    assert {k: float(v[0]) for k, v in localisation.rescore(images).items()} == {
        "Top-1 Loc": 0.0,
        "GT-known Loc": 0.0,
        "top-1": 1.0,
    }


def test_rescore_equals_a_loop_under_every_row_of_weights():
    rng = np.random.default_rng(2)
    n = 40
    images = {"rank": rng.integers(0, 3, n), "iou_top1": rng.random(n), "iou_gt": rng.random(n)}
    weights = rng.multinomial(n, np.full(n, 1 / n), size=7)
    scores = localisation.rescore(images, weights)
    for row in range(7):
        loc = known = top1 = 0
        for i in range(n):
            for _ in range(weights[row, i]):
                loc += images["rank"][i] == 0 and images["iou_top1"][i] > 0.5
                known += images["iou_gt"][i] > 0.5
                top1 += images["rank"][i] == 0
        assert [scores[k][row] for k in ("Top-1 Loc", "GT-known Loc", "top-1")] == [
            loc / n,
            known / n,
            top1 / n,
        ]
    unweighted = localisation.rescore(images)
    assert all(unweighted[k] == localisation.rescore(images, np.ones((1, n)))[k] for k in unweighted)


def test_weights_that_sum_to_zero_give_nan():
    images = {"rank": np.zeros(2, int), "iou_top1": np.ones(2), "iou_gt": np.ones(2)}
    scores = localisation.rescore(images, np.array([[0, 0], [1, 0]]))
    assert np.isnan(scores["top-1"][0]) and scores["top-1"][1] == 1


def test_chance_of_shuffled_predictions():
    rng = np.random.default_rng(3)
    n, classes = 400, 4
    labels = rng.integers(0, classes, n)
    box = np.array([[0.0, 0, 8, 8]])
    chance = localisation.shuffled_chance(
        labels, [box] * n, labels, np.repeat(box, n, 0), np.repeat(box, n, 0), rng
    )
    assert chance["GT-known Loc"] == 1  # all boxes are equal: any one will do
    assert chance["Top-1 Loc"] == chance["top-1"] == pytest.approx(1 / classes, abs=0.03)


def test_chance_carries_each_box_with_its_class():
    labels = np.array([0, 1])
    truths = [np.array([[0.0, 0, 4, 4]]), np.array([[4.0, 4, 8, 8]])]
    boxes = np.concatenate(truths)
    chance = localisation.shuffled_chance(
        labels, truths, labels, boxes, boxes, np.random.default_rng(0), rounds=200
    )
    assert chance["Top-1 Loc"] == chance["GT-known Loc"] == chance["top-1"] == pytest.approx(0.5, abs=0.1)


def test_best_centred_box_equals_the_exhaustive_search():
    rng = np.random.default_rng(4)
    truths = [random_boxes(rng, rng.integers(0, 3), 32) for _ in range(60)]
    found = localisation.best_centred_box(truths, 32.0, steps=8)
    best = 0.0
    for width in np.arange(4, 33, 4):
        for height in np.arange(4, 33, 4):
            box = np.array([16 - width / 2, 16 - height / 2, 16 + width / 2, 16 + height / 2])
            best = max(best, (localisation.best_iou(np.repeat(box[None], 60, 0), truths) > 0.5).mean())
    assert (localisation.best_iou(np.repeat(found[None], 60, 0), truths) > 0.5).mean() == best > 0
    np.testing.assert_array_equal(found[:2] + found[2:], [32, 32])


def test_best_centred_box_finds_the_one_size_and_without_boxes_the_frame():
    truth = np.array([[8.0, 4, 24, 28]])
    np.testing.assert_array_equal(localisation.best_centred_box([truth] * 3, 32.0), truth[0])
    np.testing.assert_array_equal(localisation.best_centred_box([np.zeros((0, 4))], 32.0), [0, 0, 32, 32])


def test_true_rank_equals_a_stable_sort():
    rng = np.random.default_rng(5)
    logits, labels = rng.integers(0, 4, (200, 9)).astype(float), rng.integers(0, 9, 200)  # many ties
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = [list(order[i]).index(labels[i]) for i in range(200)]
    assert classification.true_rank(logits, labels).tolist() == expected
    logits[3, 2] = np.nan
    assert classification.true_rank(logits, labels)[3] == 8


def test_top5_is_given_when_there_are_more_than_five_classes():
    rank = np.array([0, 1, 4, 5, 8])
    scores = classification.rescore({"rank": rank})
    assert (scores["top-1"][0], scores["top-5"][0]) == (1 / 5, 3 / 5)
    assert set(classification.rescore({"rank": np.array([0, 4])})) == {"top-1"}
    assert set(classification.rescore({"rank": np.array([0, 4]), "num_classes": np.full(2, 6)})) == {
        "top-1",
        "top-5",
    }
    weighted = classification.rescore({"rank": rank}, np.array([[1, 0, 0, 0, 1], [0, 3, 0, 1, 0]]))
    assert weighted["top-1"].tolist() == [0.5, 0] and weighted["top-5"].tolist() == [0.5, 0.75]
