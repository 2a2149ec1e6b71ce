"""Detections of a trained model: detection/predict.py, and what they may not depend on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import MEAN, STD, finetune_args

from backbench.common.backbones.load import Backbone
from backbench.common.backbones.resnet import Trunk
from backbench.common.base.errors import UserError
from backbench.common.data import open_detection
from backbench.detection import finetune
from backbench.detection import predict as predict_script
from backbench.detection.build import load_detector, make_model, write_facts
from backbench.detection.detect import predict
from backbench.detection.faster_rcnn import FasterRCNN
from backbench.detection.recipes import RECIPES

pytest_plugins = ["shapes"]  # its fixtures


class TestPredict:
    @pytest.fixture
    def trained(self, devkit, backbone, tmp_path):
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "runs", "ssd300")) == 0
        (cell,) = (tmp_path / "runs").rglob("cell.json")
        return cell.parent

    def test_draws_and_writes(self, trained, devkit, tmp_path, capsys):
        """The same detections as the run's own of its test images; turned pictures come upright."""
        turned = Image.open(devkit / "JPEGImages/000006.jpg").rotate(90, expand=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned.save(tmp_path / "turned.png", exif=exif)
        out = tmp_path / "out"
        arguments = ["--run", str(trained), "--out", str(out), "--score", "0.02", "--device", "cpu"]
        arguments += [str(devkit / "JPEGImages"), str(tmp_path / "turned.png")]
        assert predict_script.main(arguments) == 0
        records = json.loads((out / "detections.json").read_text())
        assert [record["drawn"] for record in records] == [*(f"{k:06d}.jpg" for k in range(10)), "turned.jpg"]
        results = json.loads((trained / "predictions.json").read_text())
        wanted = [one for one in results if one["image_id"] == "000007" and one["score"] >= 0.02]
        objects = records[7]["objects"]
        assert len(objects) == len(wanted) > 0
        for one, other in zip(objects, wanted):
            x, y, w, h = other["bbox"]
            assert one["class"] == ("ball", "cube")[other["category_id"] - 1]
            assert one["score"] == pytest.approx(other["score"], abs=1e-4)
            assert one["box"] == pytest.approx([x, y, x + w, y + h], abs=0.03)
        assert (records[10]["width"], records[10]["height"]) == (80, 60)
        for record in records:
            drawn = Image.open(out / record["drawn"])
            assert drawn.size == (record["width"], record["height"])
        plain = np.asarray(Image.open(devkit / "JPEGImages/000007.jpg")).astype(int)
        drawn = np.asarray(Image.open(out / "000007.jpg")).astype(int)
        assert np.abs(drawn - plain).mean() > 3
        assert "objects of score 0.02 or more in 11 pictures" in capsys.readouterr().out

    def test_odd_pictures(self, trained, devkit, tmp_path, capsys):
        """Of a folder what cannot be read is named and left out; every kind of picture is drawn."""
        folder, source = tmp_path / "odd", Image.open(devkit / "JPEGImages/000007.jpg")
        folder.mkdir()
        (folder / "notes.txt").write_text("no picture")
        (folder / "._a.jpg").write_bytes(b"\0\5\26\7")
        whole = (devkit / "JPEGImages/000006.jpg").read_bytes()
        (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        source.convert("CMYK").save(folder / "cmyk.jpg")
        source.convert("LA").save(folder / "grey_alpha.png")
        source.convert("P").save(folder / "moving.gif", save_all=True, append_images=[source.convert("P")])
        deep = np.asarray(source.convert("L")).astype(np.uint16) * 257
        Image.fromarray(deep).save(folder / "deep.png")
        source.save(folder / "UPPER.JPG")
        out = tmp_path / "out"
        arguments = ["--run", str(trained), "--out", str(out), "--score", "0.02", "--device", "cpu"]
        assert predict_script.main([*arguments, str(folder)]) == 0
        said = capsys.readouterr()
        names = [Path(one["image"]).name for one in json.loads((out / "detections.json").read_text())]
        assert names == ["UPPER.JPG", "cmyk.jpg", "deep.png", "grey_alpha.png", "moving.gif"]
        assert said.err.count("left out") == 1  # a hidden file is no picture
        assert f"left out: {folder / 'cut.jpg'}: not a readable image, or cut short\n" in said.err
        for drawn in ("cmyk", "deep", "grey_alpha", "moving", "UPPER"):
            assert Image.open(out / f"{drawn}.jpg").size == source.size
        with pytest.raises(UserError, match=r"cut.jpg: not a readable image, or cut short"):
            predict_script.main([*arguments, str(folder / "cut.jpg"), str(folder)])

    def test_bad_input(self, trained, devkit, tmp_path):
        picture = str(devkit / "JPEGImages/000006.jpg")
        (tmp_path / "note.jpg").write_text("no picture")
        (tmp_path / "empty").mkdir()
        for run, given, message in (
            (trained.parent, picture, "no weights.pt in it; did you mean .*seed0"),
            (tmp_path / "none", picture, "no weights.pt in it; give the folder"),
            (trained, str(tmp_path / "note.jpg"), "note.jpg: not a readable image"),
            (trained, str(tmp_path / "gone.jpg"), "gone.jpg: no such file"),
            (trained, str(tmp_path / "empty"), "no picture right in this folder"),
        ):
            with pytest.raises(UserError, match=message):
                predict_script.main(["--run", str(run), given, "--out", str(tmp_path / "o")])
        with pytest.raises(UserError, match="--score 2"):
            predict_script.main(["--run", str(trained), picture, "--score", "2"])
        facts = json.loads((trained / "model.json").read_text())
        for change, message in (
            ({"format": "backbench-detector-9"}, "not of format"),
            ({"recipe": {**facts["recipe"], "novel": 1}}, "fields novel are unknown"),
            ({"classes": ["ball"]}, "not the weights of its model.json"),
        ):
            (trained / "model.json").write_text(json.dumps({**facts, **change}))
            with pytest.raises(UserError, match=message):
                load_detector(trained)
        (trained / "model.json").unlink()
        with pytest.raises(UserError, match="--eval-only"):
            load_detector(trained)


@pytest.mark.parametrize("inside", [False, True])
def test_the_stride_of_a_bottleneck_is_kept(tmp_path, inside):
    """Where it stands cannot be seen in the weights."""
    backbone = Backbone(Trunk("resnet50", inside), "resnet50", "a", "a", "", "", "", stride_in_1x1=inside)
    recipe = RECIPES["ssd300"]["smoke"]
    model = make_model(backbone.trunk, recipe, 2, MEAN, STD)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    write_facts(tmp_path, "ssd300", backbone, ["ball", "cube"], recipe)
    block = load_detector(tmp_path)[0].trunk.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == (((2, 2), (1, 1)) if inside else ((1, 1), (2, 2)))


def test_predictions_do_not_depend_on_the_batch(devkit, backbone):
    images = open_detection(f"voc:{devkit}")[1]
    torch.manual_seed(0)
    recipe = replace(RECIPES["faster_rcnn"]["smoke"], precision="fp32", score=0.0)
    model = FasterRCNN(
        Trunk("resnet18_half"), 2, MEAN, STD, anchors=(22, 35), roi_size=5, roi_batch=16, top=5
    )
    a, b = (predict(model, images, replace(recipe, test_batch=n), torch.device("cpu")) for n in (1, 4))
    assert np.array_equal(a.image, b.image) and np.allclose(a.score, b.score, atol=1e-5)


@pytest.mark.parametrize("detector", ["ssd300", "faster_rcnn"])
@pytest.mark.parametrize("stage", ["conv1", "layer3"])
def test_broken_weights_are_refused_and_do_not_look_like_a_system_that_found_nothing(
    devkit, backbone, detector, stage
):
    images = open_detection(f"voc:{devkit}")[1]
    recipe = RECIPES[detector]["smoke"]
    model = make_model(Trunk("resnet18_half"), recipe, 2, MEAN, STD)
    next(getattr(model.trunk, stage).parameters()).data.mul_(float("nan"))
    with pytest.raises(UserError, match="outputs are not finite"):
        predict(model, images, recipe, torch.device("cpu"))
