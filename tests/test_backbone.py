"""The Trunk against torchvision, and the loader against everything that must not pass for a backbone."""

import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from backbench.common.backbones.load import (
    IMAGENET_MEAN,
    body_fingerprint,
    load_backbone,
    load_classifier,
    save_backbone,
)
from backbench.common.backbones.resnet import ARCHS, Classifier, Trunk, normalise
from backbench.common.base.errors import UserError

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
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone.trunk.eval()(images), original.trunk(images))
    classifier, facts = load_classifier(file)
    torch.testing.assert_close(classifier.eval()(images), original(images))
    assert facts["num_classes"] == 4


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a.pt", "b.pt"):
        save_backbone(tmp_path / name, trained(), arch="resnet18_half", num_classes=4)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def numbered(state, prefix):
    """The names of nn.Sequential(*list(resnet.children())[:-1])."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {
        f"{prefix}{places[k.split('.')[0]]}.{k.split('.', 1)[1]}": v
        for k, v in state.items()
        if k[:2] != "fc"
    }


def put(prefix):
    return lambda state: {prefix + k: v for k, v in state.items()}


def second(content, old, new):
    """The same weights, other values, under another prefix: the momentum network beside the trained one."""
    return {**{k.replace(old, new): v + 1 for k, v in content.items()}, **content}


head = {"projector.0.weight": torch.ones(3, 3)}
FAMILIES = {  # what the field's code saves
    "plain": lambda s: s,
    "DataParallel": lambda s: {"state_dict": put("module.")(s), "epoch": 3},
    "MoCo": lambda s: {
        "epoch": 200,
        "arch": "resnet18_half",
        "state_dict": second(put("module.encoder_q.")(s), "encoder_q", "encoder_k")
        | {"module.queue": torch.ones(2)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.03}]},
    },
    "SimSiam": lambda s: {"state_dict": put("module.encoder.")(s)},
    "solo-learn": lambda s: {
        "state_dict": second(put("backbone.")(s), "backbone", "momentum_backbone") | head,
        "global_step": 7,
    },
    "SupContrast": lambda s: {"model": put("encoder.")(s), "opt": Namespace(batch_size=256)},
    "SwAV": lambda s: put("module.")(s) | {"module.prototypes.weight": torch.ones(3, 2)},
    "Barlow Twins": lambda s: {"epoch": 1, "model": put("module.backbone.")(s) | head},
    "DINO": lambda s: {
        "student": {k: v + 1 for k, v in put("module.backbone.")(s).items()}
        | {"module.head.last_layer.weight_v": torch.ones(3, 3)},
        "teacher": put("backbone.")(s),
        "args": Namespace(arch="resnet18_half", lr=0.3),
    },
    "BYOL": lambda s: second(put("online_encoder.net.")(s), "online", "target"),
    "lightly": lambda s: {"state_dict": numbered(s, "backbone.") | head},
    "Sequential": lambda s: numbered(s, ""),
    "mmselfsup": lambda s: {
        "meta": {"epoch": 200},
        "state_dict": put("backbone.")(s) | {"head.fc.bias": torch.ones(2)},
    },
    "VISSL": lambda s: {
        "phase_idx": 99,
        "classy_state_dict": {
            "base_model": {
                "model": {"trunk": put("_feature_blocks.")(s), "heads": {"0.clf.weight": torch.ones(2)}}
            }
        },
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_file_gives_the_same_features(tmp_path, family):
    original = trained()
    torch.save(
        FAMILIES[family](original.torchvision_state()),
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=False,
    )
    backbone = load_backbone(str(tmp_path / "x.pth"))
    assert backbone.fingerprint == body_fingerprint(original.trunk)
    assert "120 keys of a body found" in backbone.report
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone.trunk.eval()(images), original.trunk(images))


def test_the_report_names_what_was_taken_and_left(tmp_path):
    torch.save(FAMILIES["MoCo"](trained().torchvision_state()), tmp_path / "x.pth")
    report = load_backbone(str(tmp_path / "x.pth")).report
    assert "key prefix 'module.encoder_q.' removed" in report
    assert "took 'module.encoder_q.', not 'module.encoder_k.': MoCo's authors evaluate it" in report
    assert "left out 3 keys that are no body: fc.bias, fc.weight, module.queue" in report


HEADS = {
    "torchvision": lambda s: s,
    "solo-learn": lambda s: {
        **{"backbone." + k: v for k, v in s.items() if k[:3] != "fc."},
        "classifier.weight": s["fc.weight"],
        "classifier.bias": s["fc.bias"],
    },
    "mmpretrain": lambda s: {
        **{"backbone." + k: v for k, v in s.items() if k[:3] != "fc."},
        "head.fc.weight": s["fc.weight"],
        "head.fc.bias": s["fc.bias"],
    },
    "official CutMix": put("module."),
}


@pytest.mark.parametrize("family", HEADS)
def test_classifiers_of_others_give_equal_logits(tmp_path, family):
    original = trained()
    torch.save({"state_dict": HEADS[family](original.torchvision_state())}, tmp_path / "x.pth")
    classifier, facts = load_classifier(tmp_path / "x.pth", classes=4)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(classifier.eval()(images), original(images))
    assert (facts["arch"], facts["num_classes"], facts["size"]) == ("resnet18_half", 4, 224)


def test_classifiers_that_are_none_of_the_datas(tmp_path, file):
    with pytest.raises(UserError, match="classifies 4 classes, the data has 10"):
        load_classifier(file, classes=10)
    torch.save(numbered(trained().torchvision_state(), ""), tmp_path / "body.pth")
    with pytest.raises(UserError, match="has no classifier"):
        load_classifier(tmp_path / "body.pth")
    state = dict(trained().torchvision_state())
    torch.save({**state, "fc.weight": state["fc.weight"] * np.nan}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="not finite"):
        load_classifier(tmp_path / "nan.pth")


def test_the_reading_is_part_of_the_fingerprint(tmp_path):
    torch.save(trained().torchvision_state(), tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    plain = load_backbone(path)
    assert plain.fingerprint == body_fingerprint(plain.trunk)
    others = [
        load_backbone(path, mean=(0.5, 0.5, 0.5)),
        load_backbone(path, std=(1, 1, 1)),
        load_backbone(path, bgr=True),
    ]
    assert len({plain.fingerprint, *(b.fingerprint for b in others)}) == 4
    scratch = [
        load_backbone("scratch:resnet50", stride_in_1x1=strided).fingerprint for strided in (False, True)
    ]
    assert scratch[0] != scratch[1]
    assert others[0].mean == (0.5, 0.5, 0.5) and others[1].std == (1.0, 1.0, 1.0)
    assert any("0.5, 0.5, 0.5 as asked for" in line for line in others[0].report)
    same = load_backbone(path, mean=IMAGENET_MEAN)  # the default, spelt out
    assert same.fingerprint == plain.fingerprint


def test_bgr_weights_read_rgb(tmp_path):
    torch.save(trained().torchvision_state(), tmp_path / "x.pth")
    images = torch.randn(1, 3, 64, 64)
    ours = load_backbone(str(tmp_path / "x.pth"), bgr=True).trunk.eval()(images)
    torch.testing.assert_close(ours, trained().trunk(images.flip(1)))
    with pytest.raises(UserError, match="drop --bgr"):
        load_backbone("scratch:resnet18", bgr=True)


def test_stride_in_the_1x1(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    plain, caffe = Trunk("resnet50").eval(), Trunk("resnet50", stride_in_1x1=True).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    caffe.load_state_dict(state)
    plain.load_state_dict(state)
    for layer in (theirs.layer2, theirs.layer3, theirs.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    images = torch.randn(1, 3, 65, 64)
    body = nn.Sequential(*list(theirs.children())[:-2])
    torch.testing.assert_close(caffe(images), body(images))
    assert not torch.allclose(caffe(images), plain(images), rtol=1e-2)
    caffe.swap_strides()
    assert torch.equal(caffe(images), plain(images))
    torch.save(trained().torchvision_state(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="resnet18_half has no 1×1 convolution"):
        load_backbone(str(tmp_path / "x.pth"), stride_in_1x1=True)


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
    "a deep stem": (
        lambda s: {k.replace("conv1.", "conv1.0.") if k[:5] == "conv1" else k: v for k, v in s.items()},
        "resnet50d",
    ),
    "a CIFAR network": (
        lambda s: {**drop(s, "layer4"), "conv1.weight": torch.ones(16, 3, 3, 3)},
        r"a CIFAR network \(its first convolution is 3×3\).*takes those of pretrain/run.py",
    ),
    "a wide network": (
        lambda s: {k: torch.ones(96) if k == "layer1.0.bn1.bias" else v for k, v in s.items()},
        "1 misshapen",
    ),
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
    page = "\n<!DOCTYPE html><html><body>404</body></html>"
    (tmp_path / "page.pth").write_text(page)
    (tmp_path / "page.safetensors").write_text(page)
    (tmp_path / "cut.safetensors").write_bytes(b"\x90\0\0\0\0\0\0\0{" + b" " * 20)
    torch.save([1, 2], tmp_path / "list.pt")
    cases = {
        "evil.pt": "could run code",
        "evil.pkl": "could run code",
        "text.pt": "not a PyTorch checkpoint",
        "cut.pt": "truncated or damaged",
        "empty.pt": "an empty file",
        "page.pth": "a web page, not a checkpoint",
        "page.safetensors": "a web page, not a checkpoint",
        "cut.safetensors": "truncated or damaged",
        "list.pt": "holds a list",
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


def test_cifar_networks_go_to_no_transfer_task(file, tmp_path):
    for arch in ("resnet110", "pyramidnet110", "pyramidnet200"):
        with pytest.raises(UserError, match=rf"a CIFAR network \({arch}\): no transfer task takes it"):
            load_backbone(_declare(file, tmp_path, arch))


def test_torchvision_by_name_from_its_cache(tmp_path, monkeypatch):
    """Random weights under the published file's name: torchvision checks the hash of a download, not of its cache."""
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    original = trained("resnet18", 1000)
    torch.save(original.torchvision_state(), cache / Path(weights.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for spec in ("torchvision:resnet18", "torchvision:resnet18.IMAGENET1K_V1"):
        classifier, facts = load_classifier(spec, classes=1000)
        images = torch.randn(1, 3, 64, 64)
        assert torch.equal(classifier.eval()(images), original(images))
        assert facts["mean"] == [0.485, 0.456, 0.406] and facts["size"] == 224
    backbone = load_backbone("torchvision:resnet18")
    assert (backbone.name, backbone.group) == ("torchvision-resnet18", "torchvision-resnet18")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    with pytest.raises(UserError, match="torchvision:resnet34: cannot be had") as error:
        load_backbone("torchvision:resnet34")
    assert "\n" not in str(error.value)


def test_timm_by_name_from_its_cache(tmp_path):
    """In a process of its own: the hub's client reads its environment when it is imported."""
    safetensors = pytest.importorskip("safetensors.torch")
    pytest.importorskip("timm")
    original = trained("resnet18", 1000)
    for name in ("resnet18.a1_in1k", "resnet50d.ra2_in1k", "resnetblur50.bt_in1k"):
        folder = tmp_path / "hub" / f"models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = {k: v.contiguous() for k, v in original.torchvision_state().items()}
    blurred = {k: v.contiguous() for k, v in trained("resnet50", 1000).torchvision_state().items()}
    files = {name: next((tmp_path / "hub").glob(f"*{name}*/snapshots/*")) for name in ("resnet18", "blur")}
    safetensors.save_file(state, files["resnet18"] / "model.safetensors")
    safetensors.save_file(blurred, files["blur"] / "model.safetensors")
    torch.save(original.trunk.state_dict(), tmp_path / "body.pt")
    code = """
import sys, torch
from backbench.common.backbones.load import load_backbone, load_classifier
from backbench.common.base.errors import UserError
model, facts = load_classifier("timm:resnet18.a1_in1k")
body = torch.load(sys.argv[1])
assert all(torch.equal(v, body[k]) for k, v in model.trunk.state_dict().items())
print(facts["arch"], facts["mean"], facts["size"])
for spec in ("timm:resnetblur50.bt_in1k", "timm:resnet34.a1_in1k", "timm:nosuchnet"):
    try:
        load_backbone(spec)
    except UserError as error:
        print(error)
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "body.pt")],
        env=env,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, blur, absent, unknown = done.stdout.splitlines()
    assert first == "resnet18 [0.485, 0.456, 0.406] 224"
    assert "resnetblur50.bt_in1k: has the weights of a resnet50 but other layers" in blur
    assert "timm:resnet34.a1_in1k: cannot be had" in absent and "timm:nosuchnet: cannot be had" in unknown
