"""The adoption report on networks whose truth is known: their batch norm was calibrated under one reading."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from backbench.common.backbones.input_check import READINGS, adoption_report, bn_distances, measure
from backbench.common.backbones.load import Backbone, body_fingerprint, load_backbone, save_backbone
from backbench.common.backbones.resnet import Classifier, Trunk, normalise
from backbench.common.base.errors import UserError
from backbench.common.data import open_classification
from backbench.common.data.decode import Fit
from backbench.common.data.types import CaptionSet

CPU = torch.device("cpu")
SIZE = 48


def photos(count: int, seed: int) -> np.ndarray:
    """Smooth coloured noise, brighter in red than in blue, as photos are: uint8 (n, SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 1, (count, 7, 7, 3)) + rng.normal(0, 1, (count, 7, 7, 1))
    smooth = np.stack([cv2.resize(c, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for c in coarse])
    fine = rng.normal(0, 0.3, (count, SIZE, SIZE, 3))
    return np.clip((smooth + fine) * [55, 48, 40] + [135, 115, 90], 0, 255).astype(np.uint8)


def calibrated(arch: str, reading=READINGS[0], stride_in_1x1: bool = False, change=None) -> Trunk:
    """Random weights whose stored statistics are those of 96 images under `reading`, after `change(trunk)`."""
    torch.manual_seed(0)
    trunk = Trunk(arch, stride_in_1x1)
    if change:
        change(trunk)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    with torch.no_grad():
        for batch in torch.from_numpy(photos(96, 1)).split(32):
            x = normalise(batch, reading.mean, reading.std)
            trunk.train()(x.flip(1) if reading.bgr else x)
    return trunk


def backbone_of(trunk: Trunk, **options) -> Backbone:
    known = {
        "name": "x",
        "group": "x",
        "method": "x",
        "source": "x.pt",
        "fingerprint": body_fingerprint(trunk),
    }
    return Backbone(trunk, trunk.arch, **known, **options)


@pytest.fixture(scope="module")
def images():
    return photos(64, 2)


@pytest.mark.parametrize("truth", READINGS, ids=lambda r: r.name)
def test_finds_the_reading_of_the_input(truth, images):
    trunk = calibrated("resnet18_half", truth)
    report = measure(backbone_of(trunk), images, CPU)
    nearest = min(report["inputs"], key=lambda c: c["distance"])
    assert nearest["name"] == truth.name
    if truth is READINGS[0]:
        assert not report["warnings"] and report["verdict"][0].startswith(f"{truth.name} fits")
    else:
        (line,) = report["warnings"]
        assert line.startswith(f"{truth.name} fits these weights better than {READINGS[0].name}")
        assert line.endswith(f"try {truth.flags}")


@pytest.mark.parametrize("truth", READINGS[1:], ids=lambda r: r.name)
def test_the_advice_it_gives_is_the_one_it_then_accepts(truth, images, tmp_path):
    """Save the weights, load them with the arguments that the warning names, and the report is content."""
    from backbench.common.run.transfer import reading, transfer_parser
    from backbench.wsol.recipes import RECIPES

    save_backbone(tmp_path / "x.pt", Classifier(calibrated("resnet18_half", truth), 3), arch="resnet18_half")
    arguments = ["--backbone", str(tmp_path / "x.pt"), *truth.flags.split()]
    args = transfer_parser("", RECIPES, "").parse_args(arguments)
    report = measure(load_backbone(args.backbone, **reading(args)), images, CPU)
    assert report["inputs"][0]["name"] == truth.name
    assert not report["warnings"] and report["verdict"][0].startswith(f"{truth.name} fits")


@pytest.mark.parametrize("truth", ["3x3", "1x1"])
def test_finds_the_convolution_that_strides(truth, images):
    trunk = calibrated("resnet50", stride_in_1x1=truth == "1x1")
    right = measure(backbone_of(trunk, stride_in_1x1=truth == "1x1"), images[:32], CPU)
    assert right["strides"][0]["name"] == truth
    assert not right["warnings"] and right["verdict"][1].startswith(f"stride in the {truth} fits")
    trunk.swap_strides()
    wrong = measure(backbone_of(trunk, stride_in_1x1=truth == "3x3"), images[:32], CPU)
    other, flag = ("1x1", "--no-stride-in-1x1") if truth == "3x3" else ("3x3", "--stride-in-1x1")
    (line,) = wrong["warnings"]
    assert line.startswith(f"stride in the {truth} fits these weights better than stride in the {other}")
    assert line.endswith(f"try {flag}")


def test_says_when_it_cannot_tell(images):
    backbone = backbone_of(calibrated("resnet18_half"))
    noise = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
    few, strange = measure(backbone, images[:8], CPU), measure(backbone, noise // 8, CPU)
    assert few["verdict"] == ["cannot tell how the weights read their input from 8 images"]
    assert not few["warnings"]
    assert not strange["warnings"] and "cannot tell" in strange["verdict"][0]
    grey = np.repeat(images.mean(3, keepdims=True).astype(np.uint8), 3, 3)
    alike = measure(backbone_of(calibrated("resnet18_half")), grey, CPU)
    assert not alike["warnings"]


def test_distances_equal_a_plain_computation(images):
    trunk = calibrated("resnet18_half").eval()
    x = normalise(torch.from_numpy(images), *[(0.4, 0.5, 0.6), (0.2, 0.3, 0.4)])
    found = bn_distances(lambda batch: trunk.run(batch, stop="layer1"), trunk, x.split(24))
    assert list(found) == ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2"]
    first = trunk.conv1(x).detach().double()
    far = []
    for channel in range(first.shape[1]):
        values = first[:, channel].flatten()
        mean, var = trunk.bn1.running_mean[channel].item(), trunk.bn1.running_var[channel].item()
        ratio = ((values.var(correction=0) + 1e-5) / (var + 1e-5)).sqrt().log().abs()
        far.append(min(3.0, ((values.mean() - mean).abs() / (var + 1e-5) ** 0.5 + ratio).item()))
    assert found["bn1"] == pytest.approx(np.mean(far), rel=1e-5)


def test_collapsed_features_are_reported(images):
    trunk = calibrated("resnet18_half")
    nn.init.zeros_(trunk.layer4[1].bn2.weight)
    nn.init.ones_(trunk.layer4[1].bn2.bias)
    nn.init.zeros_(trunk.layer4[0].bn2.weight)
    nn.init.zeros_(trunk.layer4[0].downsample[1].weight)
    report = measure(backbone_of(trunk), images, CPU)
    assert report["stages"]["layer4"]["spread"] == 0 and report["stages"]["layer3"]["spread"] > 0.05
    assert any("hardly differ between images" in line for line in report["warnings"])


class Gate(nn.Module):
    """A stage whose output channels are weighted before the next sees them."""

    def __init__(self, stage: nn.Module, channels: int) -> None:
        super().__init__()
        self.stage, self.weight = stage, torch.linspace(0.1, 0.8, channels).view(1, -1, 1, 1)

    def forward(self, x):
        return self.stage(x) * self.weight


def gated(trunk: Trunk) -> None:
    trunk.layer2 = Gate(trunk.layer2, trunk.channels["layer2"])


def with_silu(trunk: Trunk) -> None:
    for module in trunk.modules():
        if hasattr(module, "relu"):
            module.relu = nn.SiLU()


VARIANTS = {
    "gates": (gated, ["layer3", "layer4"]),
    "another activation": (with_silu, ["layer3", "layer4"]),
}


@pytest.mark.parametrize("what", VARIANTS)
def test_other_layers_between_the_stages_show(what, images):
    """The weights and statistics of a network with other layers, read as the plain one."""
    change, stages = VARIANTS[what]
    plain = Trunk("resnet18_half")
    plain.load_state_dict(
        {
            k.replace(".stage", ""): v
            for k, v in calibrated("resnet18_half", change=change).state_dict().items()
        }
    )
    report = measure(backbone_of(plain), images, CPU)
    (line,) = report["warnings"]
    assert line.startswith("the first layer fits") and "had other layers between them" in line
    assert all(stage in line for stage in stages)
    right = measure(backbone_of(calibrated("resnet18_half")), images, CPU)
    assert not right["warnings"] and all(s["distance"] < 0.25 for s in right["stages"].values())


def test_leaves_the_backbone_and_the_random_state_alone(images):
    trunk = Trunk("resnet50")
    state = {k: v.clone() for k, v in trunk.state_dict().items()}
    before = torch.random.get_rng_state()
    measure(backbone_of(trunk), images[:16], CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in trunk.state_dict().items())
    assert trunk.training and trunk.layer2[0].conv2.stride == (2, 2)
    assert not any(m._forward_pre_hooks for m in trunk.modules())


def test_kept_for_the_same_weights_data_and_size(class_folders, monkeypatch):
    train_set, _ = open_classification(f"folder:{class_folders}", None, False)
    backbone = backbone_of(calibrated("resnet18_half"), input_size=32)
    report = adoption_report(backbone, train_set, CPU, 224)
    assert (report["images"], report["size"]) == (18, 32)
    json.dumps(report)
    captions = CaptionSet("c", train_set.ids, train_set.paths, [["a"]] * 18, fingerprint="captions")
    assert adoption_report(backbone, captions, CPU, 224) == report  # the same images, another kind of set
    monkeypatch.setattr(type(train_set), "read", None)
    assert adoption_report(backbone, train_set, CPU, 224) == report  # kept: nothing is read


def test_goes_into_the_run(class_folders, tmp_path):
    from backbench.common.run.transfer import open_transfer, transfer_parser
    from backbench.wsol.recipes import RECIPES

    trunk = calibrated("resnet18_half")
    train_set, test_set = open_classification(f"folder:{class_folders}", None, False)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    fit = Fit(64, 64, short=73)
    with torch.no_grad():
        x = torch.from_numpy(np.stack([fit(train_set.read(i)) for i in range(18)]))
        trunk.train()(normalise(x, READINGS[0].mean, READINGS[0].std))
    save_backbone(tmp_path / "x.pt", Classifier(trunk, 3), arch="resnet18_half", size=64)

    def opened(out: str, *more: str):
        command = [
            "--backbone",
            str(tmp_path / "x.pt"),
            "--data",
            f"folder:{class_folders}",
            "--device",
            "cpu",
        ]
        args = transfer_parser("", RECIPES, "").parse_args([*command, "--out", str(tmp_path / out), *more])
        recipe = RECIPES["smoke"]
        reader = lambda *_: (train_set, test_set)  # noqa: E731
        return open_transfer(args, task="wsol", model="cam", recipe=recipe, settings=[], reader=reader)

    right = opened("right")
    wrong = opened("wrong", "--input-mean", "0,0,0", "--input-std", "1,1,1")
    assert not any("backbone" in note for note in right.run.notes)
    assert any(line.startswith(f"{READINGS[0].name} fits") for line in right.run.facts["backbone"]["report"])
    (note,) = [note for note in wrong.run.notes if "backbone" in note]
    assert "fits these weights better than RGB 0 to 1" in note
    report = json.loads((wrong.run.folder / "adoption.json").read_text())
    assert report["inputs"][0]["name"] == "RGB 0 to 1" and report["warnings"][0] in note
    assert right.run.keys["train"] != wrong.run.keys["train"]
    scratch = opened("scratch", "--backbone", "scratch:resnet18_half")
    assert not (scratch.run.folder / "adoption.json").exists()


@pytest.mark.parametrize(
    "option, value", [("--input-mean", "1,2"), ("--input-std", "0,1,1"), ("--input-mean", "a,b,c")]
)
def test_refuses_what_is_no_normalisation(option, value):
    from backbench.common.run.transfer import reading, transfer_parser
    from backbench.wsol.recipes import RECIPES

    args = transfer_parser("", RECIPES, "").parse_args(["--backbone", "x", option, value])
    with pytest.raises(UserError, match=f"{option} {value}: three numbers"):
        reading(args)
