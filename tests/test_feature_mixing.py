"""Mixing at a network's stages: hooks against plain loops, through wraps and gradients; the training step."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.classify.feature_mixing import StageMixer, plain_network
from backbench.common.classify.mixing import (
    METHODS,
    STAGES,
    MixingRecipe,
    Pairing,
    box_mask,
    cutmix_box,
    mix,
)
from backbench.common.classify.step import ClassifyRecipe, make_step

MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Classifier(Trunk("resnet18_half"), 4)


def pairing(stage, count, per_sample, box=True, correct_lam=True):
    rng = np.random.default_rng(3)
    m = count if per_sample else 1
    centres = torch.from_numpy(rng.random((m, 2))) if box else None
    lam, permutation = torch.from_numpy(rng.beta(1, 1, m)), torch.arange(count).roll(1)
    return Pairing(stage, permutation, lam, centres, correct_lam)


@pytest.mark.parametrize("shape", [(5, 2, 9, 14), (4, 3, 1, 1), (1, 2, 6, 7)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("box", [False, True])
def test_features_equal_a_loop(shape, per_sample, box):
    torch.manual_seed(0)
    features, draw = torch.randn(shape), pairing("layer1", shape[0], per_sample, box)
    mixed, kept = draw.apply(features)
    for i in range(shape[0]):
        m = i if per_sample else 0
        lam, other = float(draw.lam[m]), features[draw.permutation[i]]
        expected = lam * features[i] + (1 - lam) * other
        if box:
            x, y = (int(share * side) for share, side in zip(draw.centres[m].tolist(), (shape[3], shape[2])))
            x0, y0, x1, y1 = cutmix_box(shape[3], shape[2], lam, (x, y))
            expected = features[i].clone()
            expected[:, y0:y1, x0:x1] = other[:, y0:y1, x0:x1]
            mask = box_mask(torch.tensor([[x0, y0, x1, y1]]), shape[3], shape[2])
            assert float(kept[m]) == 1 - float(mask.double().mean())
            assert torch.equal(mixed[i], expected)
        else:
            assert float(kept[m]) == lam
        torch.testing.assert_close(mixed[i], expected)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_lambda_zero_and_one_at_features(lam):
    features, other = torch.randn(3, 4, 5, 6), torch.tensor([1, 2, 0])
    draw = Pairing(
        "layer1", other, torch.tensor([lam], dtype=torch.float64), torch.full((1, 2), 0.5).double()
    )
    mixed, kept = draw.apply(features)
    if lam:
        assert torch.equal(mixed, features) and kept.item() == 1
    else:  # 6 // 2 · 2 columns, 5 // 2 · 2 rows
        assert kept.item() == pytest.approx(1 - 24 / 30)
    blended = Pairing("layer1", other, draw.lam, None).apply(features)[0]
    assert torch.equal(blended, features if lam else features[other])


def run_mixed_by_hand(network, images, draw):
    trunk, x = network.trunk, images
    x = trunk.bn1(trunk.conv1(x))
    if draw.stage == "bn1":
        x = draw.apply(x)[0]
    x = trunk.maxpool(F.relu(x))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(trunk, stage)(x)
        if draw.stage == stage:
            x = draw.apply(x)[0]
    return network.fc(x.mean((2, 3)))


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("box", [False, True])
def test_hooks_equal_a_forward_pass_written_out(network, stage, box):
    network.train()
    images = torch.randn(3, 3, 48, 64)
    plain = network(images)
    mixer, draw = StageMixer(STAGES), pairing(stage, 3, True, box)
    mixer.attach(network)
    with mixer.at(draw):
        mixed = network(images)
    assert torch.equal(network(images), plain)  # inert between the steps
    mixer.detach()
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(mixed, run_mixed_by_hand(network, images, draw))
    assert not torch.allclose(mixed, plain)
    weights = list(network.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(mixed.square().sum(), weights),
        torch.autograd.grad(run_mixed_by_hand(network, images, draw).square().sum(), weights),
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradient_flows_to_both_images_of_a_pair():
    features = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    for box in (False, True):
        draw = pairing("layer1", 2, True, box)
        assert torch.autograd.gradcheck(lambda x, draw=draw: draw.apply(x)[0], features)


class Small(nn.Module):
    """A network with the stages' names, quick to compile."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1, self.layer2, self.layer3 = (nn.Sequential(nn.Conv2d(4, 4, 3, 2)) for _ in range(3))
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("wrap", ["ddp", "compile", "ddp of compile"])
def test_hooks_through_wraps(wrap, tmp_path):
    torch.manual_seed(0)
    network, counter = Small(), CompileCounter()
    images, draws = torch.randn(3, 3, 32, 32), [pairing(stage, 3, False) for stage in STAGES[1:]]
    model = network
    if "compile" in wrap:
        torch._dynamo.reset()
        model = torch.compile(model, backend=counter)
    if "ddp" in wrap:
        store = torch.distributed.FileStore(str(tmp_path / "store"))
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        model = DistributedDataParallel(model)
    try:
        assert plain_network(model) is network
        mixer = StageMixer(STAGES)
        mixer.attach(model)
        for seed in (0, 1):
            for draw in draws:
                torch.testing.assert_close(
                    run_once(mixer, model, draw, images), run_once(mixer, network, draw, images)
                )
            torch.testing.assert_close(model(images), network(images))
            if seed == 0:
                frames = counter.frame_count
        assert counter.frame_count == frames  # nothing is compiled anew for another λ or box
        if wrap == "compile":
            assert frames == 5  # one graph for each stage and one without
    finally:
        if "ddp" in wrap:
            torch.distributed.destroy_process_group()


def run_once(mixer, model, draw, images):
    with mixer.at(draw):
        return model(images)


def test_a_stage_that_is_missing_or_never_run(network):
    with pytest.raises(UserError, match="Sequential has no layer1"):
        StageMixer(["layer1"]).attach(nn.Sequential(nn.Conv2d(3, 3, 1)))
    mixer = StageMixer(["layer1"])
    mixer.attach(network)
    with pytest.raises(RuntimeError, match="no hook at layer2"), mixer.at(pairing("layer2", 2, False)):
        network(torch.randn(2, 3, 32, 32))
    mixer.detach()


@pytest.mark.parametrize("method", ["feature_cutmix", "manifold_mixup"])
def test_the_layers_are_drawn_from_the_methods_own(method):
    images, seen = torch.randn(4, 3, 8, 8), set()
    for fields in ({}, {"mix_layers": (1, 4)}):
        recipe = MixingRecipe(method=method, **fields)
        for seed in range(60):
            mixed, targets, draw = mix(images, torch.arange(4), 4, recipe, np.random.default_rng(seed))
            if draw is None:
                assert not torch.equal(targets, torch.eye(4)) or torch.equal(mixed, images)
            elif not fields:
                assert torch.equal(mixed, images) and torch.equal(targets, torch.eye(4))
            seen.add((bool(fields), 0 if draw is None else STAGES.index(draw.stage)))
    assert {layer for own, layer in seen if own} == {1, 4}
    assert {layer for own, layer in seen if not own} == set(METHODS[method].layers)


def batch(count=6, side=32, **more):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8))
    return {"images": images, "labels": torch.arange(count) % 4, **more}


def recipe(method, **fields):
    return ClassifyRecipe(method=method, epochs=1, batch=6, size=32, resize=32, **fields)


SUMS = ["baseline", "cutout+mixup", "cutmix", "cutout+manifold_mixup", "feature_cutmix+label_smoothing"]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", SUMS)
def test_steps_repeat_by_seed_and_learn_from_mixed_labels(network, method, per_sample):
    network.train()
    step = make_step(recipe(method, per_sample=per_sample), 4, MEAN, STD)
    for seed in range(5):
        one, two = (step(network, batch(), np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(one["loss"], two["loss"]) and torch.isfinite(one["loss"])
        assert 0 <= float(one["accuracy"]) <= 1


def test_step_counts_loss_and_accuracy_against_the_mixed_features_label(network):
    network.eval()
    fields = recipe("feature_cutmix", mix_layers=(2,), correct_lam=False)
    for seed in range(4):
        values = make_step(fields, 4, MEAN, STD)(network, batch(), np.random.default_rng(seed))
        images = (batch()["images"].permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
        _, _, draw = mix(images, batch()["labels"], 4, fields, np.random.default_rng(seed))
        logits, labels, lam = run_mixed_by_hand(network, images, draw), batch()["labels"], float(draw.lam)
        other = labels[draw.permutation]
        loss = lam * F.cross_entropy(logits, labels) + (1 - lam) * F.cross_entropy(logits, other)
        torch.testing.assert_close(values["loss"], loss)
        hits = [(logits.argmax(1) == y).float().mean() for y in (labels, other)]
        torch.testing.assert_close(values["accuracy"], lam * hits[0] + (1 - lam) * hits[1])


def test_label_smoothing_is_torchs_and_composes(network):
    network.eval()
    images = (batch()["images"].permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    labels = batch()["labels"]
    values = make_step(recipe("label_smoothing", label_smoothing=0.2), 4, MEAN, STD)(
        network, batch(), np.random.default_rng(0)
    )
    torch.testing.assert_close(values["loss"], F.cross_entropy(network(images), labels, label_smoothing=0.2))
    both = recipe("mixup+label_smoothing")
    values = make_step(both, 4, MEAN, STD)(network, batch(), np.random.default_rng(5))
    mixed, targets, _ = mix(images, labels, 4, both, np.random.default_rng(5))
    smoothed = 0.9 * targets + 0.1 / 4
    assert torch.allclose(smoothed.sum(1), torch.ones(6))
    expected = -(smoothed * network(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(values["loss"], expected)


class Reads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", SUMS)
def test_no_step_looks_at_a_tensors_value(network, method, per_sample):
    network.train()
    step = make_step(recipe(method, per_sample=per_sample), 4, MEAN, STD)
    with Reads() as reads:
        for seed in range(4):
            step(network, batch(), np.random.default_rng(seed))["loss"].backward()
        assert reads.count == 0
        torch.ones(()).item()
        assert reads.count == 1


@pytest.mark.parametrize("method", SUMS)
def test_steps_in_bf16_mix_by_the_labels_lambda(network, method):
    network.train()
    step = make_step(recipe(method, channels_last=True), 4, MEAN, STD)
    for seed in range(3):
        exact = step(network, batch(), np.random.default_rng(seed))
        with torch.autocast("cpu", torch.bfloat16):
            values = step(network, batch(), np.random.default_rng(seed))
        assert values["loss"].dtype == torch.float32
        torch.testing.assert_close(values["loss"], exact["loss"], rtol=0.1, atol=0.05)
    features = torch.randn(3, 4, 5, 5).bfloat16().to(memory_format=torch.channels_last)
    for draw in (pairing("layer1", 3, True, box) for box in (False, True)):
        mixed = draw.apply(features)[0]
        assert mixed.dtype == torch.bfloat16 and mixed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(mixed, draw.apply(features.double())[0].bfloat16())
