"""CutMix, Mixup and Cutout against the published figures, torchvision, timm and plain loops; sums of methods."""

from dataclasses import replace

import numpy as np
import pytest
import timm.data
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from backbench.common.base.errors import UserError
from backbench.common.classify.mixing import (
    METHODS,
    Method,
    MixingRecipe,
    box_mask,
    box_share,
    cutmix,
    cutmix_box,
    cutmix_boxes,
    cutout,
    mix,
    mix_labels,
    mixup,
    one_hot,
    parse_method,
)
from backbench.pretrain.run import main


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


CODED = torch.arange(1.0, 631.0).view(5, 1, 9, 14)
FROZEN = {  # sum of each image, changed pixels, diagonal of the targets, the generator's next draw
    "baseline": ([8001, 23877, 39753, 55629, 71505], 0, [1, 1, 1, 1, 1], 0.12857020276919962),
    "mixup": (
        [8001, 37174.13361, 26455.86639, 55629, 71505],
        252,
        [1, 0.162438, 0.162438, 1, 1],
        0.12977394939929798,
    ),
    "cutout": ([7221, 14616, 29638, 34608, 54565], 185, [1, 1, 1, 1, 1], 0.07042057615419683),
    "cutmix": ([8001, 31437, 32193, 55629, 71505], 120, [1, 0.52381, 0.52381, 1, 1], 0.9483284532917751),
}


@pytest.mark.parametrize("method", FROZEN)
def test_single_methods_draw_what_the_published_demo_drew(method):
    rng = np.random.default_rng(11)
    images, targets, _ = mix(CODED, torch.arange(5), 5, MixingRecipe(method=method), rng)
    sums, changed, diagonal, following = FROZEN[method]
    assert images.double().sum((1, 2, 3)).tolist() == pytest.approx(sums)
    assert int((images != CODED).sum()) == changed
    assert targets.diagonal().tolist() == pytest.approx(diagonal, abs=1e-6)
    assert rng.random() == following


def test_one_spelling_of_a_sum():
    assert parse_method("mixup+cutout") == ("cutout", "mixup")
    assert MixingRecipe(method="label_smoothing+cutmix").method == "cutmix+label_smoothing"
    for method in ("cutout+manifold_mixup", "dropblock+label_smoothing", "cutmix+shakedrop", *METHODS):
        assert "+".join(parse_method(method)) == method


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("cutmixup", "no method 'cutmixup'; use one of baseline, cutout, mixup"),
        ("cutout+", "no method ''"),
        ("cutout+cutout", "cutout is given twice"),
        ("baseline+cutout", "baseline is nothing to add to"),
        ("mixup+feature_cutmix", "mixup and feature_cutmix both mix pairs"),
    ],
)
def test_methods_that_are_refused(method, what):
    with pytest.raises(UserError, match=what.replace("?", ".")):
        MixingRecipe(method=method)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"method": "stochdepth"}, "stochdepth is for pretraining only"),
        ({"alpha": 0.0}, "alpha=0.0, it must be above 0"),
        ({"alpha": -1.0, "method": "mixup"}, "alpha=-1.0, it must be above 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"probability": 1.5}, "probability=1.5"),
        ({"cutout_share": 1.2, "method": "cutout"}, "a mask no larger than the image"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"method": "cutout+mixup", "batch": 1}, "mixup mixes pairs, a micro-batch of 1 image has none"),
        ({"method": "feature_cutmix", "batch": 4, "micro_batch": 1}, "feature_cutmix mixes pairs"),
        ({"cutmix_variant": "one_hot", "method": "mixup"}, "cutmix_variant=one_hot is CutMix's"),
        ({"cutmix_variant": "big", "method": "cutmix"}, "choose one of standard, fixed_size"),
        ({"mix_layers": (1,), "method": "cutmix"}, "mix_layers belongs to manifold_mixup and feature_cutmix"),
        ({"mix_layers": (2, 5), "method": "manifold_mixup"}, "mix_layers=2,5, choose among 0 image, 1 bn1"),
    ],
)
def test_fields_that_are_refused(fields, what):
    with pytest.raises(UserError, match=what):
        MixingRecipe(epochs=1, **fields).check()
    MixingRecipe(epochs=1, batch=1, method="cutout+label_smoothing").check()


def test_boxes_of_a_batch_equal_those_of_each_image():
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (32, 32), (13, 9), (1, 7)):
        lam = np.append(rng.beta(1, 1, 300), [0.0, 1.0, 0.75])
        centres = np.stack([rng.integers(width, size=303), rng.integers(height, size=303)], 1)
        boxes = cutmix_boxes(width, height, torch.from_numpy(lam), torch.from_numpy(centres))
        assert [tuple(box) for box in boxes.tolist()] == [
            cutmix_box(width, height, x, (int(c[0]), int(c[1]))) for x, c in zip(lam, centres)
        ]


@pytest.mark.parametrize("shape", [(5, 3, 9, 14), (1, 3, 8, 8), (4, 2, 12, 7)])
def test_mixing_each_image_equals_a_loop(shape):
    rng = np.random.default_rng(1)
    images, count = torch.randn(shape), shape[0]
    permutation, lam = torch.from_numpy(rng.permutation(count)), torch.from_numpy(rng.beta(1, 1, count))
    centres = torch.from_numpy(rng.integers(7, size=(count, 2)))
    boxes = cutmix_boxes(shape[3], shape[2], lam, centres)
    cut, blend = cutmix(images, permutation, boxes), mixup(images, permutation, lam)
    labels = mix_labels(torch.eye(count), permutation, lam)
    kept = 1 - box_mask(boxes, shape[3], shape[2]).double().mean((1, 2, 3))
    for i in range(count):
        x0, y0, x1, y1 = boxes[i].tolist()
        expected = images[i].clone()
        expected[:, y0:y1, x0:x1] = images[permutation[i], :, y0:y1, x0:x1]
        assert torch.equal(cut[i], expected)
        assert kept[i].item() == pytest.approx(1 - box_share((x0, y0, x1, y1), shape[3], shape[2]), abs=1e-12)
        x = float(lam[i])
        torch.testing.assert_close(blend[i], x * images[i] + (1 - x) * images[permutation[i]])
        torch.testing.assert_close(
            labels[i], x * torch.eye(count)[i] + (1 - x) * torch.eye(count)[permutation[i]]
        )


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_equal_timms_mixup(mode):
    torch.manual_seed(0)
    images, labels = torch.randn(6, 3, 10, 10), torch.tensor([0, 1, 2, 3, 0, 1])
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002 timm draws from the global generator
        timms = timm.data.Mixup(mixup_alpha=1.0, mode=mode, label_smoothing=0, num_classes=4)
        theirs, their_targets = timms(images.clone(), labels)
        np.random.seed(seed)  # noqa: NPY002
        draw = timms._params_per_elem(6)[0] if mode == "elem" else [timms._params_per_batch()[0]]
        lam, flipped = (
            torch.tensor(np.array(draw)),
            torch.arange(6).flip(0),
        )  # timm pairs with the flipped batch
        torch.testing.assert_close(mixup(images, flipped, lam), theirs)
        ours = mix_labels(one_hot(labels, 4), flipped, lam)
        torch.testing.assert_close(ours, their_targets)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_equal_timms_cutmix(mode):
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 12, 12).clone()
    labels, flipped = torch.arange(6), torch.arange(6).flip(0)
    for seed in range(4):
        np.random.seed(seed)  # noqa: NPY002
        timms = timm.data.Mixup(mixup_alpha=0, cutmix_alpha=1.0, mode=mode, label_smoothing=0, num_classes=6)
        theirs, their_targets = timms(images.clone(), labels)
        boxes = torch.zeros(6, 4, dtype=torch.long)
        for i, changed in enumerate((theirs != images)[:, 0]):
            rows, columns = torch.where(changed)
            if len(rows):
                ends = columns.max() + 1, rows.max() + 1
                boxes[i] = torch.tensor([columns.min(), rows.min(), *ends])
        assert torch.equal(cutmix(images, flipped, boxes), theirs)
        kept = 1 - box_mask(boxes, 12, 12).double().mean((1, 2, 3))
        torch.testing.assert_close(mix_labels(one_hot(labels, 6), flipped, kept), their_targets)


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
def test_per_sample_sampler(method):
    recipe = MixingRecipe(method=method, per_sample=True, probability=0.5)
    images = torch.arange(400.0).view(400, 1, 1, 1).expand(400, 1, 10, 13).clone()
    mixed, targets, _ = mix(images, torch.arange(400), 400, recipe, np.random.default_rng(0))
    assert torch.allclose(targets.sum(1), torch.ones(400))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(400.0), atol=1e-3, rtol=1e-5)
    own = targets.diagonal()
    assert (own == 1).float().mean() == pytest.approx(0.5, abs=0.1)
    assert len(own[own < 1].unique()) > 25  # λ of their own
    again = mix(images, torch.arange(400), 400, recipe, np.random.default_rng(0))
    assert torch.equal(mixed, again[0]) and torch.equal(targets, again[1])


def own_shares(draws=300, shape=(2, 1, 32, 32), progress=None, **fields):
    """Of many micro-batches of two images: the label's own share, and the pixels' (nan where nothing was mixed)."""
    images, recipe = torch.arange(2.0).view(2, 1, 1, 1).expand(shape), MixingRecipe(method="cutmix", **fields)
    found = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        mixed, targets, _ = mix(images, torch.arange(2), 2, recipe, rng, progress)
        if not torch.equal(targets, torch.eye(2)) or not torch.equal(mixed, images):
            found.append((float(targets[0, 0]), 1 - float(mixed[0].mean())))
    return np.array(found)


def test_fixed_size_cutmix():
    label, pixels = own_shares(cutmix_variant="fixed_size").T
    np.testing.assert_allclose(label, pixels, atol=1e-6)
    assert label.min() == pytest.approx(0.75) and (label > 0.75).any()  # 16² of 32², less at the border
    label, pixels = own_shares(cutmix_variant="fixed_size", correct_lam=False).T
    assert set(label) == {0.75} and len(set(pixels)) > 5


def test_one_hot_and_complete_label():
    label, pixels = own_shares(cutmix_variant="one_hot").T
    assert set(label) == {0.0, 1.0}
    np.testing.assert_array_equal(label, pixels >= 0.5)
    label, pixels = own_shares(cutmix_variant="complete_label").T
    assert set(label) == {0.5} and (pixels < 1).all()
    images, recipe = (
        torch.zeros(64, 1, 32, 32),
        MixingRecipe(method="cutmix", cutmix_variant="complete_label"),
    )
    recipe = replace(recipe, per_sample=True, probability=0.5)
    targets = mix(images, torch.arange(64), 64, recipe, np.random.default_rng(0))[1]
    assert set(targets.diagonal().tolist()) == {0.5, 1.0}


def test_centre_gaussian_cutmix():
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 40, 40)
    weight = {}
    for variant in ("standard", "centre_gaussian"):
        recipe, replaced = (
            MixingRecipe(method="cutmix", cutmix_variant=variant, alpha=20.0),
            torch.zeros(40, 40),
        )
        for seed in range(600):
            replaced += mix(images, torch.arange(2), 2, recipe, np.random.default_rng(seed))[0][0, 0]
        weight[variant] = float(
            replaced[16:24, 16:24].mean() / replaced[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
        )
    assert weight["centre_gaussian"] > 2 * weight["standard"]


def test_scheduled_cutmix():
    fields = {"cutmix_variant": "scheduled", "probability": 0.1}
    for progress in (0.0, 0.3, 0.9):
        mixed = len(own_shares(progress=progress, draws=600, **fields)) / 600
        assert mixed == pytest.approx(
            progress / 2, abs=0.06
        )  # half of the permutations of two change nothing
    with pytest.raises(ValueError, match="progress"):
        own_shares(draws=1, **fields)


@pytest.mark.parametrize("per_sample", [False, True])
def test_cutout_comes_before_the_mixing(per_sample):
    recipe = MixingRecipe(method="mixup+cutout", per_sample=per_sample, probability=0.5)
    for seed in range(6):
        mixed, targets, _ = mix(
            torch.ones(4, 1, 16, 16), torch.arange(4), 4, recipe, np.random.default_rng(seed)
        )
        if torch.equal(targets, torch.eye(4)):
            assert set(mixed.unique().tolist()) == {0.0, 1.0}  # Cutout is for every batch
        else:
            assert len(mixed.unique()) > 2  # a hole of either image, blended


def test_one_hot_labels_equal_torchs():
    labels = torch.tensor([2, 0, 3])
    assert torch.equal(one_hot(labels, 5), F.one_hot(labels, 5).float())


def test_mixed_images_stay_channels_last():
    images = torch.randn(4, 3, 8, 6).to(memory_format=torch.channels_last)
    other, lam = torch.tensor([1, 0, 3, 2]), torch.full((4,), 0.3)
    boxes = torch.tensor([[1, 1, 3, 4]])
    for mixed in (
        *(mixup(images, other, 0.3), mixup(images, other, lam), cutout(images, torch.full((4, 2), 3), 4)),
        *(cutmix(images, other, (1, 1, 3, 4)), cutmix(images, other, boxes)),
    ):
        assert mixed.is_contiguous(memory_format=torch.channels_last) and mixed.dtype == images.dtype


def test_a_method_is_one_line_of_the_table(monkeypatch, tmp_path):
    """A method that changes each image, added by its line alone, trains through the command that users call."""
    seen = []

    def negative(images, recipe, rng):
        seen.append(len(images))
        return -images

    monkeypatch.setitem(METHODS, "negative", Method("image", negative))
    options = ["--recipe", "smoke", "--arch", "resnet18_half", "--set", "epochs=0", "--set", "iterations=2"]
    main(["--method", "mixup+negative", *options, "--limit", "24", "--out", str(tmp_path)])
    assert seen == [seen[0]] * 2 and (tmp_path / "mixup+negative.pt").exists()
