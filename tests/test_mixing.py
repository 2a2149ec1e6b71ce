"""CutMix, Mixup and Cutout against the published figures, torchvision and plain loops."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from common.mixing import MixingRecipe, box_share, cutmix, cutmix_box, cutout, mix, mixup


def boxes(width, height, draws, alpha=1.0, seed=0):
    rng = np.random.default_rng(seed)
    lams = rng.beta(alpha, alpha, draws)
    centres = zip(rng.integers(width, size=draws), rng.integers(height, size=draws))
    return [cutmix_box(width, height, lam, (int(x), int(y))) for lam, (x, y) in zip(lams, centres)]


@pytest.mark.parametrize(("side", "kept"), [(224, 0.6822), (64, 0.6899), (32, 0.7008), (8, 0.7674)])
def test_mean_lambda_equals_the_official_codes(side, kept):
    areas = np.array([box_share(box, side, side) for box in boxes(side, side, 40_000)])
    assert 1 - areas.mean() == pytest.approx(kept, abs=0.004)


def test_area_distribution_at_224():
    areas = np.array([box_share(box, 224, 224) for box in boxes(224, 224, 40_000)])
    assert np.percentile(areas, [10, 50, 90]) == pytest.approx([0.077, 0.303, 0.576], abs=0.006)
    assert (areas > 0.5).mean() == pytest.approx(0.174, abs=0.006)


@pytest.mark.parametrize(("alpha", "area"), [(0.1, 0.288), (0.5, 0.309), (1, 0.317), (4, 0.330)])
def test_mean_area_by_alpha(alpha, area):
    areas = [box_share(box, 224, 224) for box in boxes(224, 224, 40_000, alpha)]
    assert np.mean(areas) == pytest.approx(area, abs=0.004)


def test_share_of_replaced_pixels_at_32():
    replaced = np.zeros((32, 32))
    for x0, y0, x1, y1 in boxes(32, 32, 20_000):
        replaced[y0:y1, x0:x1] += 1
    replaced /= 20_000
    assert replaced[15:17, 15:17].mean() == pytest.approx(0.459, abs=0.015)
    assert np.mean([replaced[0, 16], replaced[-1, 16], replaced[16, 0], replaced[16, -1]]) == pytest.approx(
        0.250, abs=0.03
    )


@pytest.mark.parametrize("shape", [(4, 3, 12, 12), (5, 3, 9, 14), (2, 3, 7, 5), (1, 3, 8, 8)])
def test_cutmix_copies_the_box_and_nothing_else(shape):
    images = torch.randn(shape)
    permutation = torch.roll(torch.arange(shape[0]), 1)
    box = cutmix_box(shape[3], shape[2], 0.4, (shape[3] // 2, 1))
    mixed = cutmix(images, permutation, box)
    inside = torch.zeros(shape[2:], dtype=torch.bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert torch.equal(mixed[:, :, inside], images[permutation][:, :, inside])
    assert torch.equal(mixed[:, :, ~inside], images[:, :, ~inside])
    assert box_share(box, shape[3], shape[2]) == pytest.approx(inside.float().mean().item())


def test_lambda_zero_and_one():
    images, permutation = torch.randn(3, 3, 8, 8), torch.tensor([1, 2, 0])
    assert torch.equal(cutmix(images, permutation, cutmix_box(8, 8, 1.0, (3, 3))), images)
    assert torch.equal(cutmix(images, permutation, cutmix_box(8, 8, 0.0, (4, 4))), images[permutation])
    assert torch.equal(mixup(images, permutation, 1.0), images)


def test_equal_torchvisions_cutmix_and_mixup(monkeypatch):
    images, labels = torch.randn(6, 3, 16, 20), torch.arange(6) % 4
    rolled = torch.arange(6).roll(1)  # torchvision pairs with the batch rolled by one
    torch.manual_seed(3)
    theirs, their_targets = v2.MixUp(num_classes=4, alpha=1.0)(images, labels)
    lam = float(their_targets[1].max() if their_targets[1].max() > 0.5 else their_targets[1][labels[1]])
    torch.testing.assert_close(mixup(images, rolled, lam), theirs)
    torch.manual_seed(5)
    theirs, their_targets = v2.CutMix(num_classes=4)(images, labels)
    changed = (theirs != images).any(1).any(0)
    rows, columns = torch.where(changed)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    assert torch.equal(cutmix(images, rolled, box), theirs)
    assert 1 - box_share(box, 20, 16) == pytest.approx(float(their_targets[1][labels[1]]), abs=1e-6)


def test_cutout_equals_a_loop_and_has_the_published_share():
    rng = np.random.default_rng(0)
    images = torch.ones(400, 1, 32, 32)
    centres = torch.from_numpy(rng.integers(32, size=(400, 2)))
    done = cutout(images, centres, 16)
    for image, (x, y) in zip(done[:50], centres[:50].tolist()):
        expected = torch.ones(32, 32)
        expected[max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 0
        assert torch.equal(image[0], expected)
    every = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    share = 1 - cutout(torch.ones(1024, 1, 32, 32), every, 16).mean().item()
    assert share == pytest.approx(0.19141, abs=0.001)


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_labels_sum_to_one_and_match_the_pixels(method):
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 10, 13).clone()
    mixed, targets, _ = mix(images, torch.arange(5), 5, MixingRecipe(method=method), np.random.default_rng(4))
    assert torch.allclose(targets.sum(1), torch.ones(5))
    assert torch.allclose(mixed.mean((1, 2, 3)), targets @ torch.arange(5.0), atol=1e-5)


def test_uncorrected_lambda_keeps_the_draw():
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    seen = [
        mix(images, labels, 4, MixingRecipe(method="cutmix", correct_lam=flag), np.random.default_rng(s))[1]
        for s in range(20)
        for flag in (True, False)
    ]
    assert any(not torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2]))


def test_probability_and_seed():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    untouched = [
        mix(images, labels, 4, MixingRecipe(method="cutmix", probability=0.5), np.random.default_rng(s))[0]
        is images
        for s in range(300)
    ]
    assert np.mean(untouched) == pytest.approx(0.5, abs=0.1)
    one, two = (
        mix(images, labels, 4, MixingRecipe(method="mixup"), np.random.default_rng(9)) for _ in range(2)
    )
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_soft_targets_equal_the_weighted_sum_of_two_losses():
    logits, a, b, lam = torch.randn(6, 5), torch.randint(5, (6,)), torch.randint(5, (6,)), 0.3
    targets = lam * torch.eye(5)[a] + (1 - lam) * torch.eye(5)[b]
    loss = torch.nn.functional.cross_entropy
    torch.testing.assert_close(loss(logits, targets), lam * loss(logits, a) + (1 - lam) * loss(logits, b))
