"""The CIFAR networks: the paper's parameter counts, and logits equal to a plain functional reading of the blocks."""

import pytest
import torch
from torch.nn import functional as F

from backbench.common.backbones.load import load_backbone, save_backbone
from backbench.common.base.errors import UserError
from backbench.pretrain.networks import ALL_ARCHS, NETWORKS, CifarResNet, PyramidNet, build, load_network


@pytest.mark.parametrize(
    ("arch", "classes", "count"),
    [
        ("pyramidnet200", 100, 26_844_952),
        ("pyramidnet200", 10, 26_752_702),
        ("pyramidnet110", 100, 1_725_300),
        ("resnet110", 100, 1_170_868),
        ("resnet50", 1000, 25_557_032),
        ("resnext101_32x4d", 1000, 44_177_704),
    ],
)
def test_parameter_counts(arch, classes, count):
    with torch.device("meta"):
        network = build(arch, classes)
    assert sum(p.numel() for p in network.parameters()) == count
    assert {"conv1", "bn1", "layer1", "layer2", "layer3"} <= set(
        dict((network if arch in NETWORKS else network.trunk).named_children())
    )


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Every tensor random, so that no term of the forward can hide behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(0)
    for key, tensor in network.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(0.5, 0.3, generator=generator)
    return network.eval()


def bn(state, name, x):
    keys = (f"{name}.running_mean", f"{name}.running_var", f"{name}.weight", f"{name}.bias")
    return F.batch_norm(x, *(state[key] for key in keys))


def blocks(state, layer):
    return sorted({int(key.split(".")[1]) for key in state if key.startswith(f"layer{layer}.")})


def test_pyramidnet_equals_a_plain_reading_of_the_paper():
    network = shaken(PyramidNet("tiny", 20, 10, 7))
    state = network.state_dict()
    images = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    x = bn(state, "bn1", F.conv2d(images, state["conv1.weight"], padding=1))
    for layer in (1, 2, 3):
        assert blocks(state, layer) == [0, 1]
        for k in blocks(state, layer):
            name, stride = f"layer{layer}.{k}", 2 if layer > 1 and k == 0 else 1
            out = F.conv2d(bn(state, f"{name}.bn1", x), state[f"{name}.conv1.weight"])
            out = F.relu(bn(state, f"{name}.bn2", out))
            out = F.conv2d(out, state[f"{name}.conv2.weight"], stride=stride, padding=1)
            out = F.relu(bn(state, f"{name}.bn3", out))
            out = bn(state, f"{name}.bn4", F.conv2d(out, state[f"{name}.conv3.weight"]))
            shortcut = F.avg_pool2d(x, 2, ceil_mode=True) if stride == 2 else x
            whole = torch.zeros_like(out)
            whole[:, : shortcut.shape[1]] = shortcut
            x = out + whole
    x = F.relu(bn(state, "bn_final", x)).mean((2, 3))
    expected = F.linear(x, state["fc.weight"], state["fc.bias"])
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected)
    # addrate 10 / 6: widths 16 + 1.67, + 3.33 … rounded, four times that out
    widths = [state[f"layer{n}.{k}.conv3.weight"].shape[0] for n in (1, 2, 3) for k in (0, 1)]
    assert widths == [4 * w for w in (18, 19, 21, 23, 24, 26)]


def test_resnet_equals_a_plain_reading_of_the_paper():
    network = shaken(CifarResNet("tiny", 20, 7))
    state = network.state_dict()
    images = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    x = F.relu(bn(state, "bn1", F.conv2d(images, state["conv1.weight"], padding=1)))
    for layer in (1, 2, 3):
        assert blocks(state, layer) == [0, 1]
        for k in blocks(state, layer):
            name, stride = f"layer{layer}.{k}", 2 if layer > 1 and k == 0 else 1
            out = F.relu(bn(state, f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"])))
            out = F.conv2d(out, state[f"{name}.conv2.weight"], stride=stride, padding=1)
            out = F.relu(bn(state, f"{name}.bn2", out))
            out = bn(state, f"{name}.bn3", F.conv2d(out, state[f"{name}.conv3.weight"]))
            if k == 0:
                x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                x = bn(state, f"{name}.downsample.1", x)
            x = F.relu(out + x)
    expected = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected)


@pytest.mark.parametrize("arch", ["resnet110", "pyramidnet110"])
def test_gradients_reach_every_parameter(arch):
    torch.manual_seed(0)
    network = build(arch, 5)
    logits = network(torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("arch", ["resnet18_half", "resnet110", "pyramidnet110"])
def test_a_file_gives_the_network_back(arch, tmp_path):
    torch.manual_seed(0)
    network = shaken(build(arch, 5))
    save_backbone(tmp_path / "a.pt", network, arch=arch, num_classes=5, method="baseline", seed=3)
    again, facts = load_network(tmp_path / "a.pt")
    assert facts == {**facts, "arch": arch, "num_classes": 5, "seed": 3} and "state_dict" not in facts
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), network(images))


def test_bad_files_and_names_give_one_line(tmp_path):
    torch.manual_seed(0)
    network = build("resnet110", 5)
    with pytest.raises(UserError, match=r"no such network; choose one of .*resnet50.*pyramidnet200"):
        build("resnet111", 5)
    save_backbone(tmp_path / "count.pt", network, arch="resnet110", num_classes=6)
    with pytest.raises(UserError, match=r"not a resnet110 of 6 classes .*size mismatch for fc"):
        load_network(tmp_path / "count.pt")
    save_backbone(tmp_path / "other.pt", network, arch="pyramidnet110", num_classes=5)
    with pytest.raises(UserError, match="not a pyramidnet110 of 5 classes"):
        load_network(tmp_path / "other.pt")
    save_backbone(tmp_path / "later.pt", network, arch="resnet1001", num_classes=5)
    with pytest.raises(UserError, match=r"later\.pt: its network resnet1001 is none of"):
        load_network(tmp_path / "later.pt")
    save_backbone(tmp_path / "bare.pt", network, arch="resnet110")
    with pytest.raises(UserError, match="has no 'num_classes'"):
        load_network(tmp_path / "bare.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        load_network(tmp_path / "text.pt")


def test_a_transfer_task_refuses_a_cifar_network_in_one_line(tmp_path):
    network = shaken(build("resnet110", 5))
    save_backbone(tmp_path / "cifar.pt", network, arch="resnet110", num_classes=5)
    with pytest.raises(UserError, match=r"cifar\.pt"):
        load_backbone(str(tmp_path / "cifar.pt"))
    assert set(NETWORKS) <= set(ALL_ARCHS)
