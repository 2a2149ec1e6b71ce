"""The Trunk against torchvision, and the loader against everything that must not pass for a backbone."""

import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from common.backbone import body_fingerprint, load_backbone, load_classifier, save_backbone
from common.errors import UserError
from common.trunk import ARCHS, Classifier, Trunk, normalise

COUNTS = {
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext101_32x4d": 44_177_704,
}


def trained(arch="resnet18_half", classes=4, seed=0) -> Classifier:
    """A classifier whose batch-norm statistics are not the initial ones."""
    torch.manual_seed(seed)
    model = Classifier(Trunk(arch), classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def file(tmp_path):
    """A backbone file of this project."""
    save_backbone(
        tmp_path / "cutmix.pt",
        trained(),
        arch="resnet18_half",
        num_classes=4,
        method="cutmix",
        seed=3,
        mean=[0.5] * 3,
    )
    return tmp_path / "cutmix.pt"


@pytest.mark.parametrize("arch", COUNTS)
def test_parameter_counts(arch):
    with torch.device("meta"):
        assert sum(p.numel() for p in Classifier(Trunk(arch), 1000).parameters()) == COUNTS[arch]


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_equals_torchvision_in_keys_and_logits(arch):
    theirs = getattr(torchvision.models, arch)(num_classes=7).eval()
    ours = Classifier(Trunk(arch), 7).eval()
    assert list(ours.torchvision_state()) == list(theirs.state_dict())
    ours.trunk.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    ours.fc.load_state_dict(theirs.fc.state_dict())
    images = torch.randn(2, 3, 65, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_dilated_layer4_equals_torchvisions():
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    ours = Trunk("resnet50").eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    ours.unstride("layer4", dilate=True)
    images = torch.randn(1, 3, 64, 64)
    body = nn.Sequential(*list(theirs.children())[:-2])
    torch.testing.assert_close(ours(images), body(images))
    assert ours.strides == {"stem": 4, "layer1": 4, "layer2": 8, "layer3": 16, "layer4": 16}


@pytest.mark.parametrize("arch", ARCHS)
def test_declared_channels_and_strides_are_true(arch):
    trunk = Trunk(arch).eval()
    with torch.no_grad():
        for stage, features in trunk.features(torch.randn(1, 3, 64, 64), trunk.channels).items():
            assert features.shape == (
                1,
                trunk.channels[stage],
                64 // trunk.strides[stage],
                64 // trunk.strides[stage],
            )


def test_stride_one_layer4_gives_14_by_14():
    trunk = Trunk("resnet50").eval()
    keys = list(trunk.state_dict())
    trunk.unstride("layer4")
    with torch.no_grad():
        assert trunk(torch.randn(1, 3, 224, 224)).shape == (1, 2048, 14, 14)
    assert list(trunk.state_dict()) == keys


def test_frozen_stages_stay_frozen_in_training():
    model = trained().trunk
    model.freeze("layer1")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"layer2", "layer3", "layer4"}


def test_frozen_batch_norm_keeps_its_statistics():
    model = trained().trunk
    model.freeze_bn()
    model.train()
    before = model.bn1.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.bn1.running_mean, before) and not model.bn1.weight.requires_grad


def test_normalise_takes_both_layouts():
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    expected = torchvision.transforms.functional.normalize(images.permute(0, 3, 1, 2) / 255, mean, std)
    torch.testing.assert_close(normalise(images, mean, std), expected)
    torch.testing.assert_close(normalise(images.permute(0, 3, 1, 2), mean, std), expected)


def test_round_trip_of_the_backbone_file(file):
    backbone = load_backbone(str(file))
    assert (backbone.arch, backbone.method, backbone.group, backbone.name) == (
        "resnet18_half",
        "cutmix",
        "cutmix",
        "cutmix-p3",
    )
    assert backbone.mean == (0.5, 0.5, 0.5) and backbone.pretrain_seed == 3 and not backbone.scratch
    original = trained()
    assert backbone.fingerprint == body_fingerprint(original.trunk)
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone.trunk.eval()(images), original.trunk(images))
    classifier, facts = load_classifier(file)
    torch.testing.assert_close(classifier.eval()(images), original(images))
    assert facts["num_classes"] == 4


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_backbone(tmp_path / name, trained(), arch="resnet18_half", num_classes=4)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.encoder.", "module.encoder_q."])
def test_prefixes_of_the_field(tmp_path, prefix):
    state = trained().torchvision_state()
    content = {prefix + k: v for k, v in state.items()}
    if "encoder_q" in prefix:
        content |= {k.replace("encoder_q", "encoder_k"): v + 1 for k, v in content.items()}
    torch.save({"state_dict": content, "epoch": 3}, tmp_path / "x.pt")
    backbone = load_backbone(str(tmp_path / "x.pt"))
    assert backbone.fingerprint == body_fingerprint(trained().trunk)
    assert any(prefix in line for line in backbone.report)


def test_official_cutmix_tar_with_numpy_scalars(tmp_path):
    state = {"module." + k: v for k, v in trained().torchvision_state().items()}
    content = {"epoch": 299, "best_err1": np.float64(21.4), "arch": "resnet", "state_dict": state}
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert load_backbone(str(tmp_path / "model_best.pth.tar")).arch == "resnet18_half"


def test_scratch_depends_on_the_seed_only():
    one, same, other = (load_backbone("scratch:resnet18_half", seed=s) for s in (1, 1, 2))
    assert one.scratch and one.name == "scratch"
    assert body_fingerprint(one.trunk) == body_fingerprint(same.trunk) != body_fingerprint(other.trunk)


def drop(state, prefix):
    return {k: v for k, v in state.items() if not k.startswith(prefix)}


BROKEN = {
    "half a body": (lambda s: drop(s, "layer4.1"), "none of resnet18"),
    "a key missing": (lambda s: drop(s, "layer3.0.bn2.weight"), r"1 missing \(layer3.0.bn2.weight\)"),
    "a stray key": (
        lambda s: {**s, "layer2.0.se.weight": torch.ones(3)},
        r"1 unexpected \(layer2.0.se.weight\)",
    ),
    "a wrong shape": (lambda s: {**s, "layer4.0.bn1.weight": torch.ones(7)}, "1 misshapen"),
    "NaN": (lambda s: {**s, "layer1.0.conv1.weight": s["layer1.0.conv1.weight"] * np.nan}, "1 not finite"),
    "no network": (lambda s: {"a": torch.ones(3)}, "no ResNet in it"),
    "untouched statistics": (
        lambda s: {
            k: torch.zeros_like(v) if k.endswith("mean") else torch.ones_like(v) if k.endswith("var") else v
            for k, v in s.items()
        },
        "never trained",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_refuses_in_one_line(tmp_path, what):
    spoil, message = BROKEN[what]
    torch.save(spoil(dict(trained().torchvision_state())), tmp_path / "x.pt")
    with pytest.raises(UserError, match=message) as error:
        load_backbone(str(tmp_path / "x.pt"))
    assert "x.pt" in str(error.value) and "\n" not in str(error.value)


class Evil:
    """Pickles as a call."""

    def __reduce__(self):
        return (print, ("code ran",))


def test_refuses_files_that_are_no_checkpoint(tmp_path, file, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:-2000])
    (tmp_path / "empty.pt").write_bytes(b"")
    cases = {
        "evil.pt": "could run code",
        "evil.pkl": "could run code|not a PyTorch",
        "text.pt": "not a PyTorch checkpoint",
        "cut.pt": "truncated or damaged",
        "empty.pt": "truncated or damaged",
        "absent.pt": "no such file",
        ".": "is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            load_backbone(str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert "code ran" not in capsys.readouterr().out


def test_contradicting_arch_and_unknown_names(file, tmp_path):
    with pytest.raises(UserError, match="its weights are a resnet18_half, not a resnet50"):
        load_backbone(_declare(file, tmp_path, "resnet50"))
    with pytest.raises(UserError, match="its weights are a resnet18_half, not a resnet34"):
        load_backbone(str(file), arch="resnet34")
    with pytest.raises(UserError, match="no architecture 'vgg'"):
        load_backbone("scratch:vgg")
    with pytest.raises(UserError, match="torchvision:resnet999: cannot be had"):
        load_backbone("torchvision:resnet999")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "format": "backbench-backbone-99"}, tmp_path / "future.pt")
    with pytest.raises(UserError, match="unknown here"):
        load_backbone(str(tmp_path / "future.pt"))


def _declare(file, folder, arch):
    torch.save({**torch.load(file, weights_only=True), "arch": arch}, folder / "other.pt")
    return str(folder / "other.pt")
