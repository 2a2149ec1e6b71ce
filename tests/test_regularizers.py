"""Stochastic depth, DropBlock and ShakeDrop against torchvision and plain formulas, and their hooks."""

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import drop_block2d, stochastic_depth

from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.classify.step import ClassifyRecipe, make_step
from backbench.common.engine import REQUEUE, train
from backbench.pretrain.networks import CifarResNet, PyramidNet
from backbench.pretrain.regularizers import (
    RegularizedRecipe,
    drop_block,
    drop_block_seeds,
    expectation,
    fold,
    install,
    linear_keep,
    residual_blocks,
    shakedrop,
)


def recipe(method, **fields):
    return RegularizedRecipe(method=method, epochs=1, batch=4, size=32, resize=32, **fields)


NETWORKS = {  # how it is made, blocks, last batch norm of a branch
    "resnet18_half": (lambda: Classifier(Trunk("resnet18_half"), 4), 8, "bn2"),
    "resnet50": (lambda: Classifier(Trunk("resnet50"), 4), 16, "bn3"),
    "resnet20": (lambda: CifarResNet("resnet20", 20, 4), 6, "bn3"),
    "pyramid20": (lambda: PyramidNet("pyramid20", 20, 12, 4), 6, "bn4"),
}


def made(name):
    torch.manual_seed(0)
    return NETWORKS[name][0]()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_branch_is_found(name):
    _, count, last = NETWORKS[name]
    found = residual_blocks(made(name))
    assert len(found) == count
    assert all(norm is getattr(block, last) for _, block, norm in found)
    assert [stage for stage, _, _ in found] == sorted(stage for stage, _, _ in found)


def test_a_network_without_blocks():
    with pytest.raises(UserError, match="Sequential: no residual blocks"):
        install(nn.Sequential(nn.Conv2d(3, 3, 1)), recipe("stochdepth"))


@pytest.mark.parametrize("shape", [(3, 4, 9, 14), (5, 4, 5, 5), (4, 6, 3, 8)])
@pytest.mark.parametrize("block", [1, 3, 5])
def test_dropblock_equals_torchvision(shape, block):
    block = min(block, *shape[2:])
    features = torch.randn(shape)
    corners = (*shape[:2], shape[2] - block + 1, shape[3] - block + 1)
    gamma = 0.2 * shape[2] * shape[3] / (block**2 * corners[2] * corners[3])
    torch.manual_seed(7)
    seeds = torch.empty(corners).bernoulli_(gamma)
    torch.manual_seed(7)
    theirs = drop_block2d(features, 0.2, block)
    torch.testing.assert_close(drop_block(features, seeds, block), theirs)
    assert (theirs == 0).any() and (theirs != 0).any()


@pytest.mark.parametrize("block", [2, 3, 4])
def test_dropblock_equals_a_loop(block):
    torch.manual_seed(1)
    features = torch.randn(2, 3, 7, 9)
    seeds = (torch.rand(2, 3, 8 - block, 10 - block) < 0.1).float()
    kept = torch.ones(2, 3, 7, 9)
    for n, c, y, x in seeds.nonzero().tolist():
        kept[n, c, y : y + block, x : x + block] = 0
    torch.testing.assert_close(
        drop_block(features, seeds, block), features * kept * kept.numel() / kept.sum()
    )


def test_dropblocks_share():
    torch.manual_seed(0)
    shape = torch.Size((64, 64, 16, 16))
    seeds = drop_block_seeds(shape, torch.tensor(0.1), 4)
    assert seeds.shape == (64, 64, 13, 13)
    assert seeds.mean().item() == pytest.approx(0.1 * 256 / (16 * 169), rel=0.05)
    dropped = (drop_block(torch.ones(shape), seeds, 4) == 0).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=0.015)  # overlaps make it a little less


def test_shakedrop_equals_its_formula_and_gradient():
    torch.manual_seed(0)
    features = torch.randn(5, 3, 4, 6, requires_grad=True)
    alpha, beta, upstream = torch.rand(5) * 2 - 1, torch.rand(5), torch.randn(5, 3, 4, 6)
    for gate in (torch.tensor(0.0), torch.tensor(1.0), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])):
        out = shakedrop(features, gate, alpha, beta)
        (gradient,) = torch.autograd.grad(out, features, upstream)
        for i in range(5):
            b = float(gate if gate.ndim == 0 else gate[i])
            torch.testing.assert_close(out[i], features[i] * (1.0 if b else alpha[i]))
            torch.testing.assert_close(gradient[i], upstream[i] * (1.0 if b else beta[i]))
    assert shakedrop(features.bfloat16(), gate, alpha, beta).dtype == torch.bfloat16


def test_keep_probabilities_fall_linearly():
    assert [linear_keep(0.5, number, 4) for number in (1, 2, 3, 4)] == [0.875, 0.75, 0.625, 0.5]
    assert expectation(0.6, recipe("shakedrop")) == pytest.approx(0.6)
    assert expectation(0.6, recipe("shakedrop", shakedrop_alpha=(0.0, 1.0))) == pytest.approx(0.8)


@pytest.mark.parametrize("block_type", [BasicBlock, Bottleneck])
def test_hooks_equal_blocks_written_out(block_type):
    """A network of one block whose branch and output are known: what each hook does to it, draw for draw."""
    torch.manual_seed(0)
    channels = 4 * block_type.expansion
    network = nn.Module()
    network.layer1 = nn.Sequential(block_type(channels, 4))
    block, images = network.layer1[0], torch.randn(6, channels, 8, 8)
    branches = []
    last = block.bn2 if block_type is BasicBlock else block.bn3
    last.register_forward_hook(lambda m, i, output: branches.append(output.clone()))
    plain = block(images)
    torch.testing.assert_close(plain, torch.relu(branches[0] + images))

    hooks = install(network, recipe("stochdepth", stochdepth=0.5))
    torch.manual_seed(1)
    ours = block(images)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, torch.relu(stochastic_depth(branches[0], 0.5, "row") + images))
    assert not torch.equal(ours, plain)
    hooks.remove()

    hooks = install(network, recipe("dropblock", dropblock_schedule="constant", dropblock_block=3))
    torch.manual_seed(1)
    ours = block(images)
    torch.manual_seed(1)
    torch.testing.assert_close(
        ours, drop_block(plain, drop_block_seeds(plain.shape, torch.tensor(0.1), 3), 3)
    )
    assert not torch.equal(ours, plain)
    hooks.remove()

    hooks = install(network, recipe("shakedrop"))
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        ours = block(images)
        torch.manual_seed(seed)
        gate, alpha = (torch.rand(()) < 0.5).float(), torch.empty(6).uniform_(-1, 1)
        scale = (gate + alpha - gate * alpha).view(6, 1, 1, 1)
        torch.testing.assert_close(ours, torch.relu(branches[0] * scale + images))
        ratios.append(float(gate))
    assert 0 < np.mean(ratios) < 1
    hooks.remove()
    assert torch.equal(block(images), plain)


@pytest.mark.parametrize("name", ["resnet18_half", "resnet20", "pyramid20"])
@pytest.mark.parametrize("method", ["stochdepth", "dropblock", "shakedrop", "cutmix+stochdepth+dropblock"])
def test_training_only_repeatable_and_trainable(name, method):
    model, images = made(name), torch.randn(4, 3, 32, 32)
    model.eval()
    before = model(images)
    install(model, recipe(method))
    if "shakedrop" not in method:
        assert torch.equal(model(images), before)
    model.train()
    torch.manual_seed(5)
    one = model(images)
    torch.manual_seed(5)
    assert torch.equal(model(images), one)
    torch.manual_seed(6)
    assert not torch.equal(model(images), one)
    one.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18_half", "resnet20", "pyramid20"])
def test_folded_weights_compute_what_the_hooks_did(name):
    fields, model, images = recipe("shakedrop"), made(name), torch.randn(4, 3, 32, 32)
    for module in model.modules():  # not 1 and 0
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias)
    hooks = install(model.eval(), fields)
    hooked = model(images)
    hooks.remove()
    assert not torch.allclose(model(images), hooked, rtol=1e-3)
    fold(model, fields)
    torch.testing.assert_close(model(images), hooked, rtol=1e-4, atol=1e-4)
    fold(model, recipe("stochdepth"))
    torch.testing.assert_close(model(images), hooked, rtol=1e-4, atol=1e-4)


def test_scheduled_dropblock_follows_the_training():
    model, fields = made("resnet20"), recipe("dropblock+label_smoothing", dropblock_keep=0.5)
    hooks = install(model, fields)
    step = hooks.wrap(make_step(fields, 4, (0.5,) * 3, (0.2,) * 3))
    zeros = []
    model.layer3[-1].register_forward_hook(lambda m, i, out: zeros.append((out == 0).float().mean().item()))
    batch = {
        "images": torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8),
        "labels": torch.arange(4),
    }
    for progress in (0.0, 0.5, 0.99):
        torch.manual_seed(0)
        values = step(model, {**batch, "progress": progress}, np.random.default_rng(0))
        assert torch.isfinite(values["loss"])
    assert zeros[0] < zeros[1] < zeros[2]
    with pytest.raises(ValueError, match="progress"):
        step(model, batch, np.random.default_rng(0))
    constant = install(made("resnet20"), recipe("dropblock", dropblock_schedule="constant"))
    assert constant.wrap(step) is step


def test_hooks_in_a_compiled_network():
    torch._dynamo.reset()
    torch.manual_seed(0)
    network, counter = nn.Module(), CompileCounter()
    network.layer1 = nn.Sequential(BasicBlock(4, 4))
    network.forward = network.layer1.forward
    hooks = install(network, recipe("stochdepth+dropblock+shakedrop", dropblock_keep=0.5))
    step = hooks.wrap(lambda model, batch, rng: {"out": model(batch["images"])})
    model, images = torch.compile(network, backend=counter), torch.randn(4, 4, 8, 8, requires_grad=True)
    for progress in (0.1, 0.4, 0.9):
        found = []
        for each in (network, model):
            torch.manual_seed(3)
            out = step(each, {"images": images, "progress": progress}, None)["out"]
            found.append((out, *torch.autograd.grad(out.sum(), images)))
        torch.testing.assert_close(*found)
        assert (found[0][0] == 0).any()
        if progress == 0.1:
            frames = counter.frame_count
    assert counter.frame_count == frames > 0


def test_other_methods_install_nothing():
    model = made("resnet20")
    for method in ("baseline", "cutout+mixup", "feature_cutmix+label_smoothing"):
        install(model, recipe(method))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"stochdepth": 1.5}, "stochdepth=1.5, it must be from 0 to 1"),
        ({"dropblock_keep": -0.1}, "dropblock_keep=-0.1"),
        ({"dropblock_block": 0}, "dropblock_block=0, at least 1 pixel"),
        ({"dropblock_stages": 0}, "dropblock_stages=0"),
        ({"dropblock_schedule": "cosine"}, "choose one of linear, constant"),
        ({"shakedrop_alpha": (1.0, -1.0)}, "shakedrop_alpha is a range"),
        ({"shakedrop_beta": (1.0,)}, "shakedrop_beta is a range"),
    ],
)
def test_fields_that_are_refused(fields, what):
    with pytest.raises(UserError, match=what):
        recipe("stochdepth", **fields).check()


def test_only_pretraining_takes_them():
    recipe("dropblock+label_smoothing").check()
    with pytest.raises(UserError, match="shakedrop is for pretraining only"):
        ClassifyRecipe(method="cutmix+shakedrop", epochs=1).check()


class Images:
    """Eight images, as `train` reads them."""

    workers = 0

    def __len__(self):
        return 8

    def batch(self, indices, rngs):
        images = [rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for rng in rngs]
        return {
            "images": torch.from_numpy(np.stack(images)),
            "labels": torch.tensor(indices) % 4,
            "ids": [str(i) for i in indices],
        }


@pytest.mark.parametrize(
    "method", ["cutmix+shakedrop", "feature_cutmix+stochdepth+dropblock+label_smoothing"]
)
def test_killed_and_resumed_is_the_same_to_the_bit(method, tmp_path):
    fields = RegularizedRecipe(method=method, iterations=5, batch=4, size=32, resize=32, precision="fp32")

    def run(folder, kill_at=None):
        model = made("resnet20")
        step, done = install(model, fields).wrap(make_step(fields, 4, (0.5,) * 3, (0.2,) * 3)), []

        def counted(*args):
            done.append(1)
            if len(done) == kill_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args)

        folder.mkdir(exist_ok=True)
        train(model, counted, Images(), fields, folder=folder, key="k", seed=3, device=torch.device("cpu"))
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "killed", kill_at=2)
    assert stopped.value.code == REQUEUE
    resumed = run(tmp_path / "killed")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
