"""Scores of attacked, occluded, mixed and out-of-distribution images, and the paper's, against plain loops."""

import numpy as np
import pytest
from scipy.stats import norm

from backbench.common.board.paper import METHODS, OOD_MEAN, OOD_METRICS, OOD_SETS, reference
from backbench.common.metrics import ood, rescore
from backbench.common.metrics.robustness import pair_mean
from backbench.pretrain import stress
from backbench.pretrain.outliers import PAPER
from backbench.pretrain.robustness_report import RATES, roc_curves, statistics


def plain_ood(inside, outside):
    """The three scores by their definitions, threshold by threshold, pair by pair."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*inside, *outside}, reverse=True):
        accepted = [sum(c >= threshold for c in side) / len(side) for side in (inside, outside)]
        points.append(tuple(accepted))
    won = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    return {
        "TNR@95": 1 - next(false for true, false in points if true >= 0.95),
        "AUROC": sum(won) / len(won),
        "detection accuracy": max((true + 1 - false) / 2 for true, false in points),
    }


def own_ood(inside, outside, *weights):
    return {
        k: float(v[0]) for k, v in ood.scores(*ood.roc(np.array(inside), np.array(outside), *weights)).items()
    }


def test_ood_scores_of_known_vectors():
    found = own_ood([0.9, 0.8, 0.7, 0.6], [0.65, 0.3, 0.2, 0.1])
    assert found == {"TNR@95": 0.75, "AUROC": 0.9375, "detection accuracy": 0.875}
    assert own_ood([0.5] * 4, [0.5] * 3) == {"TNR@95": 0.0, "AUROC": 0.5, "detection accuracy": 0.5}
    normal = norm.ppf((np.arange(50_000) + 0.5) / 50_000)
    found = own_ood(normal + 2, normal)
    assert list(found.values()) == pytest.approx([0.63876, 0.92135, 0.84134], abs=5e-5)


@pytest.mark.parametrize("seed", range(20))
def test_ood_scores_equal_a_plain_loop_with_ties_and_weights_equal_repetition(seed):
    rng = np.random.default_rng(seed)
    inside = rng.integers(0, rng.integers(2, 30), rng.integers(1, 41)) / 7  # 20 and 40: 95 % is met exactly
    outside = rng.integers(0, rng.integers(2, 30), rng.integers(1, 41)) / 7
    assert own_ood(inside, outside) == pytest.approx(plain_ood(inside, outside), abs=1e-12)
    counts = [rng.multinomial(len(side), np.full(len(side), 1 / len(side))) for side in (inside, outside)]
    repeated = [np.repeat(side, count) for side, count in zip((inside, outside), counts)]
    weighted = own_ood(inside, outside, *(count[None] for count in counts))
    assert weighted == pytest.approx(plain_ood(*repeated), abs=1e-12)


def test_ood_rows_without_an_image_of_one_side_are_nan():
    weights, ones = np.array([[1.0, 1], [0, 0]]), np.ones((2, 2))
    for rates in (ood.roc([2, 3], [1, 2], weights, ones), ood.roc([2, 3], [1, 2], ones, weights)):
        for values in ood.scores(*rates).values():
            assert np.isfinite(values[0]) and np.isnan(values[1])


def test_a_drawn_roc_curve_is_the_largest_true_rate_at_each_false_rate():
    rng = np.random.default_rng(0)
    found = {
        "confidence": rng.integers(0, 20, 90) / 7,
        "set": np.repeat([0, 1], [50, 40]),
        "sets": np.array(["a"]),
    }
    inside, outside = found["confidence"][:50], found["confidence"][50:]
    thresholds = [np.inf, *found["confidence"]]
    for rate, true in zip(RATES, roc_curves(found)["a"]):
        possible = [(inside >= t).mean() for t in thresholds if (outside >= t).mean() <= rate]
        assert true == pytest.approx(max(possible))


def random_statistics(test, rng, n=12):
    labels = rng.integers(0, 3, n)
    if test == "ood":
        truth = {"set": np.repeat([0, 1, 2], [n - 6, 3, 3]), "sets": np.array(["a", "b"])}
        return statistics(test, {"confidence": rng.integers(0, 5, n) / 5}, truth)
    if test == "fgsm":
        answers = {kind: rng.integers(0, 3, n) for kind in ("clean", "attacked")}
    elif test == "occlusion":
        answers = {kind: rng.integers(0, 3, (n, 5)) for kind in ("centre", "boundary")}
    else:
        answers = {"mixup": rng.integers(0, 3, (30, 4)), "cutmix": rng.integers(0, 3, (30, 5))}
    return statistics(test, answers, {"labels": labels, "pairs": stress.draw_pairs(n, 30, 0)})


@pytest.mark.parametrize("test", ["fgsm", "occlusion", "between", "ood"])
def test_image_weights_equal_repeated_images(test):
    """A weight of 2 is the image twice; a pair then counts as often as its two images make it."""
    rng = np.random.default_rng(1)
    images = random_statistics(test, rng)
    n = 12
    weights = np.array([[1.0] * n, [2, 0, 1, 1, 3, 1, 2, 0, 1, 1, 2, 1]])
    found = rescore("robustness", images, weights)
    for name, value in rescore("robustness", images).items():
        assert found[name][0] == pytest.approx(value[0], abs=1e-12), name
    index = np.repeat(np.arange(n), weights[1].astype(int))
    if test == "between":
        times = (weights[1][images["first"]] * weights[1][images["second"]]).astype(int)
        chosen = np.repeat(np.arange(30), times)
        again = {k: v[chosen] for k, v in images.items()}
    else:
        again = {k: v if k == "sets" else v[index] for k, v in images.items()}
    for name, value in rescore("robustness", again).items():
        assert found[name][1] == pytest.approx(value[0], abs=1e-12), name


def test_scores_of_answers_by_plain_loops():
    labels, pairs = np.array([0, 1, 2]), np.array([[0, 1], [2, 0]])
    answers = {"mixup": np.array([[0, 1, 2], [2, 1, 0]]), "cutmix": np.array([[2, 2], [1, 2]])}
    found = rescore("robustness", statistics("between", answers, {"labels": labels, "pairs": pairs}))
    assert found["either class, Mixup"][0] == pytest.approx(4 / 6)
    assert found["either class, CutMix"][0] == pytest.approx(1 / 4)
    assert found["either class"][0] == pytest.approx((4 / 6 + 1 / 4) / 2)
    answers = {"centre": np.array([[0, 0], [1, 0], [0, 2]]), "boundary": np.array([[1, 0], [1, 1], [0, 0]])}
    found = rescore("robustness", statistics("occlusion", answers, {"labels": labels}))
    assert {k: v[0] for k, v in found.items()} == pytest.approx(
        {"top-1 occluded": 7 / 12, "top-1 centre": 4 / 6, "top-1 boundary": 3 / 6, "top-1 clean": 2 / 3}
    )


def test_intervals_of_pairs_cover_their_true_mean():
    """Many data sets of a known mean: 95 % intervals from image weights hold it, those of independent pairs do not."""
    n, rng, inside, naive = 40, np.random.default_rng(0), 0, 0
    pairs = stress.draw_pairs(n, 400, seed=0)
    for _ in range(150):
        effect = rng.normal(size=n)
        values = (effect[pairs[:, 0]] + effect[pairs[:, 1]])[:, None]
        weights = rng.multinomial(n, np.full(n, 1 / n), size=200).astype(float)
        spread = pair_mean(values, pairs[:, 0], pairs[:, 1], weights).std()
        inside += abs(values.mean()) < 1.96 * spread
        naive += abs(values.mean()) < 1.96 * values.std() / len(pairs) ** 0.5
    assert inside / 150 > 0.9 and naive / 150 < 0.7


def test_the_papers_out_of_distribution_tables_agree():
    """Table 12 is Table A3's mean over the seven sets, to the printed digit."""
    assert sorted(OOD_SETS) == sorted(PAPER)
    for number in range(len(METHODS)):
        means = np.mean([rows[number] for rows in OOD_SETS.values()], axis=0)
        assert means.round(1).tolist() == pytest.approx(list(OOD_MEAN[number]))
    assert OOD_METRICS == ood.NAMES
    where = {"data": "cifar100", "arch": "pyramidnet200", "recipe": "paper"}
    assert reference("robustness", "ood", "TNR@95 uniform", "cutmix", **where).value == 1.0
    found = reference(
        "robustness", "fgsm", "top-1 attacked", "mixup", data="ilsvrc", arch="resnet50", recipe="paper"
    )
    assert found.value == 0.244 and found.comparable
