"""Exports, each read back by the library it is for and held against our logits."""

import importlib
import json

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from backbench.common.backbones.export import export
from backbench.common.backbones.load import body_fingerprint, load_backbone, load_classifier, save_backbone
from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.cli.main import _main
from backbench.pretrain import evaluate

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def trained(arch: str, classes: int = 5, **options) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(Trunk(arch, **options), classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """Write a backbone file of an architecture; (path, its classifier)."""

    def save(arch: str, **options):
        model = trained(arch, **options)
        facts = {"arch": arch, "num_classes": 5, "classes": list("abcde"), "method": "cutmix", "seed": 3}
        save_backbone(tmp_path / "x.pt", model, **facts, mean=MEAN, std=STD, size=160)
        return tmp_path / "x.pt", model

    return save


def close(theirs, model, images):
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(theirs), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_reads_it(arch, saved, images, tmp_path):
    path, model = saved(arch)
    lines = export(str(path), "torchvision", tmp_path / "out" / "x.pth")
    theirs = torchvision.models.get_model(arch, num_classes=5).eval()
    theirs.load_state_dict(torch.load(tmp_path / "out" / "x.pth"))
    close(theirs(images).detach(), model, images)
    beside = json.loads((tmp_path / "out" / "x.pth.json").read_text())
    assert (beside["mean"], beside["std"], beside["size"]) == (MEAN, STD, 160)
    assert lines[0] == f"model = torchvision.models.{arch}(num_classes=5)"
    assert lines[-1].startswith("its input: RGB/255, less 0.5, 0.4, 0.3, over 0.2, 0.25, 0.3, 160 px")


def test_the_printed_lines_load_it(saved, images, tmp_path):
    """torchvision has no resnext101_32x4d by name: the printed lines build one; and they are run here."""
    path, model = saved("resnext101_32x4d")
    lines = export(str(path), "torchvision", tmp_path / "x.pth")
    scope = {"torch": torch, "torchvision": torchvision, "ResNet": ResNet, "Bottleneck": Bottleneck}
    exec("\n".join(lines[:-1]), scope)
    close(scope["model"].eval()(images).detach(), model, images)


def test_timm_reads_it(saved, images, tmp_path):
    timm = pytest.importorskip("timm")
    path, model = saved("resnet18")
    (line, _) = export(str(path), "timm", tmp_path / "x.pth")
    scope = {"timm": timm}
    exec(line, scope)
    close(scope["model"].eval()(images).detach(), model, images)
    config = torch.load(tmp_path / "x.pth")["pretrained_cfg"]
    assert (config["mean"], config["std"], config["input_size"]) == (MEAN, STD, [3, 160, 160])
    assert evaluate.load(str(tmp_path / "x.pth"))[1]["classes"] == list("abcde")
    body = tmp_path / "body.pth"
    torch.save(model.trunk.state_dict(), body)
    export(str(body), "timm", tmp_path / "y.pth")
    headless = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "y.pth")).eval()
    torch.testing.assert_close(headless(images), model.trunk(images).mean((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "resnet18_half"])
def test_safetensors_reads_it(arch, saved, images, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    path, model = saved(arch)
    export(str(path), "safetensors", tmp_path / "x.safetensors")
    state = importlib.import_module("safetensors.torch").load_file(tmp_path / "x.safetensors")
    assert state.keys() == model.torchvision_state().keys()
    if arch == "resnet18":
        theirs = torchvision.models.resnet18(num_classes=5).eval()
        theirs.load_state_dict(state)
        close(theirs(images).detach(), model, images)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = file.metadata()
    assert (json.loads(said["mean"]), json.loads(said["size"]), said["arch"]) == (MEAN, 160, arch)
    ours, facts = load_classifier(tmp_path / "x.safetensors")
    close(ours.eval()(images).detach(), model, images)
    assert (facts["mean"], facts["std"], facts["size"], facts["classes"]) == (MEAN, STD, 160, list("abcde"))
    again = load_backbone(str(tmp_path / "x.safetensors"))
    assert again.fingerprint == load_backbone(str(path)).fingerprint and again.name == "cutmix-p3"


def test_onnxruntime_reads_it(saved, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, model = saved("resnet18_half")
    export(str(path), "onnx", tmp_path / "x.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.onnx", "x.pt"]
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    for batch in (images, images[:1, :, :, :64]):  # any number and size of images
        close(session.run(["logits"], {"images": batch.numpy()})[0], model, batch)
    said = session.get_modelmeta().custom_metadata_map
    assert (json.loads(said["mean"]), json.loads(said["std"]), said["size"]) == (MEAN, STD, "160")
    assert json.loads(said["classes"]) == list("abcde")


def test_stride_in_the_1x1_goes_along(saved, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path, model = saved("resnet50", stride_in_1x1=True)
    for to in ("torchvision", "timm"):
        with pytest.raises(UserError, match=f"{to}'s resnet50 strides in the 3×3"):
            export(str(path), to, tmp_path / "x.pth", stride_in_1x1=True)
    export(str(path), "safetensors", tmp_path / "x.safetensors", stride_in_1x1=True)
    ours, facts = load_classifier(tmp_path / "x.safetensors")
    assert facts["stride_in_1x1"]
    close(ours.eval()(images).detach(), model, images)
    export(str(path), "onnx", tmp_path / "x.onnx", stride_in_1x1=True)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": images.numpy()})[0], model, images)


def test_bgr_weights_leave_as_rgb(saved, images, tmp_path):
    path, model = saved("resnet18")
    export(str(path), "torchvision", tmp_path / "x.pth", bgr=True)
    theirs = torchvision.models.resnet18(num_classes=5).eval()
    theirs.load_state_dict(torch.load(tmp_path / "x.pth"))
    close(theirs(images).detach(), model, images.flip(1))


def test_the_command(saved, images, tmp_path, capsys):
    path, model = saved("resnet18")
    out = tmp_path / "x.safetensors"
    command = ["export", str(path), "--to", "safetensors", "--out", str(out), "--input-mean", "0.1,0.2,0.3"]
    assert _main(command) == 0
    assert "less 0.1, 0.2, 0.3, over 0.2, 0.25, 0.3, 160 px" in capsys.readouterr().out
    backbone = load_backbone(str(out))
    assert backbone.mean == (0.1, 0.2, 0.3)
    assert body_fingerprint(backbone.trunk) == body_fingerprint(model.trunk)


def test_refused_in_one_line(saved, tmp_path):
    path, _ = saved("resnet18_half")
    cases = [
        (str(path), "torchvision", tmp_path / "x.pth", {}, "torchvision has no resnet18_half"),
        (str(path), "timm", tmp_path / "x.pth", {}, "timm has no resnet18_half"),
        ("scratch:resnet18", "timm", tmp_path / "x.pth", {}, "random weights"),
        (str(path), "safetensors", tmp_path, {}, "is a folder"),
        (str(path), "onnx", path / "x.onnx", {}, "cannot write there"),
        (str(tmp_path / "no.pt"), "onnx", tmp_path / "x.onnx", {}, "no such file"),
    ]
    for spec, to, out, reading, message in cases:
        with pytest.raises(UserError, match=message) as error:
            export(spec, to, out, **reading)
        assert "\n" not in str(error.value)
    assert np.array_equal(sorted(p.name for p in tmp_path.iterdir()), ["x.pt"])
