"""Detection's training: batches, the command line, resuming, the NaN guard."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shapes import MEAN, finetune_args
from torch import nn

from backbench.common.backbones.load import Backbone
from backbench.common.backbones.resnet import Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.recipe import override
from backbench.common.data import open_detection
from backbench.common.engine.loader import MicroBatches, Positions, make_loader
from backbench.common.run import keys
from backbench.detection import finetune
from backbench.detection.build import load_detector
from backbench.detection.data import TrainViews, class_notes
from backbench.detection.recipes import RECIPES

pytest_plugins = ["shapes"]  # its fixtures
SMOKE_SSD, SMOKE_FRCNN = RECIPES["ssd300"]["smoke"], RECIPES["faster_rcnn"]["smoke"]


class TestLoading:
    @pytest.mark.parametrize("recipe", [SMOKE_SSD, SMOKE_FRCNN])
    def test_equal_for_any_workers(self, devkit, backbone, recipe):
        data = TrainViews(open_detection(f"voc:{devkit}")[0], recipe, MEAN)

        def run(workers):
            batches = MicroBatches(data, 4, 2, seed=3)
            return list(make_loader(batches, Positions(0, 3, range(2)), workers, pin=False))

        def flat(value):
            if isinstance(value, torch.Tensor):
                return [value]
            return [t for v in value for t in flat(v)] if isinstance(value, list) else [torch.tensor(0)]

        for a, b in zip(run(0), run(2), strict=True):
            assert a["ids"] == b["ids"]
            for key in a.keys() - {"ids"}:
                assert all(torch.equal(x, y) for x, y in zip(flat(a[key]), flat(b[key]), strict=True))

    def test_difficult_objects(self, devkit, backbone):
        train_set = open_detection(f"voc:{devkit},train=test,test=trainval")[0]
        rng = np.random.default_rng
        for keep, count in ((True, 2), (False, 1)):
            recipe = replace(SMOKE_FRCNN, keep_difficult=keep)
            batch = TrainViews(train_set, recipe, MEAN).batch([3], [rng(0)])
            assert batch["ids"][0].startswith("000009 (smallest box: ") and len(batch["labels"][0]) == count


class TestFinetune:
    @pytest.mark.parametrize("detector", ["ssd300", "faster_rcnn"])
    def test_writes_its_cell_and_repeats_exactly(self, devkit, backbone, tmp_path, detector, capsys):
        files = {}
        for out in ("a", "b"):
            assert finetune.main(finetune_args(devkit, backbone, tmp_path / out, detector)) == 0
            (cell,) = (tmp_path / out).rglob("cell.json")
            names = ("predictions.json", "images.npz", "report.json")
            files[out] = [(cell.parent / name).read_bytes() for name in names]
        assert files["a"] == files["b"]
        data = json.loads(cell.read_text())
        assert (
            cell.parent.relative_to(tmp_path / "b")
            .as_posix()
            .startswith(f"shapes/detection/{detector}/smoke")
        )
        assert set(data["metrics"]) == set(data["chance"]) == {"mAP", "mAP_area", "AP", "AP50", "AP75"}
        assert data["primary"] == "mAP"
        report = (cell.parent / "report.md").read_text()
        assert "| ball |" in report and "chance" in report
        before = cell.stat().st_mtime_ns
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "b", detector)) == 0
        assert "finished already" in capsys.readouterr().out and cell.stat().st_mtime_ns == before

    @pytest.mark.parametrize("detector", ["ssd300", "faster_rcnn"])
    def test_killed_and_resumed_is_the_same_to_the_byte(
        self, devkit, backbone, tmp_path, detector, monkeypatch
    ):
        more = ("--set", "iterations=3", "--set", "save_every=0")
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "a", detector, *more)) == 0
        make, calls = finetune.STEPS[detector], []

        def dies(recipe):
            step = make(recipe)

            def dying(*args):
                calls.append(1)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return step(*args)

            return dying

        with monkeypatch.context() as patch:
            patch.setitem(finetune.STEPS, detector, dies)
            with pytest.raises(KeyboardInterrupt):
                finetune.main(finetune_args(devkit, backbone, tmp_path / "b", detector, *more))
        (resume,) = (tmp_path / "b").rglob("resume.pt")
        assert torch.load(resume)["iteration"] == 2
        assert finetune.main(finetune_args(devkit, backbone, tmp_path / "b", detector, *more)) == 0
        for name in ("predictions.json", "images.npz"):
            files = [next((tmp_path / out).rglob(name)).read_bytes() for out in "ab"]
            assert files[0] == files[1]

    def test_scratch_freezes_nothing(self, devkit, backbone, tmp_path):
        arguments = finetune_args(devkit, "scratch:resnet18_half", tmp_path / "s", "faster_rcnn")
        assert finetune.main([*arguments, "--set", "freeze_bn=true"]) == 0
        (cell,) = (tmp_path / "s").rglob("cell.json")
        assert any("nothing is frozen" in note for note in json.loads(cell.read_text())["notes"])

    def test_refuses_to_compile_changing_shapes(self, devkit, backbone, tmp_path):
        with pytest.raises(UserError, match="leave it out"):
            finetune.main([*finetune_args(devkit, backbone, tmp_path, "faster_rcnn"), "--compile"])

    def test_refuses_to_score_at_negative_intervals(self, devkit, backbone, tmp_path):
        with pytest.raises(UserError, match="--every -1: give a number of iterations"):
            finetune.main([*finetune_args(devkit, backbone, tmp_path, "ssd300"), "--every", "-1"])

    @pytest.mark.parametrize("detector", ["ssd300", "faster_rcnn"])
    def test_every_recipe_by_its_name(self, backbone, tmp_path, detector):
        for name in {name for recipes in RECIPES.values() for name in recipes}:
            message = (
                "no such folder" if name in RECIPES[detector] else f"--recipe {name}: {detector} has smoke"
            )
            arguments = finetune_args(tmp_path / "none", backbone, tmp_path, detector, "--recipe", name)
            with pytest.raises(UserError, match=message):
                finetune.main([*arguments, "--set", "epochs=0"])

    def test_recipe_fields(self):
        for recipes in RECIPES.values():
            assert list(recipes)[:4] == ["smoke", "tiny", "mini", "paper"]
            for recipe in recipes.values():
                recipe.check()
        for setting in ("expand=0.5", "nms=0", "freeze=layer9", "top=0"):
            with pytest.raises(UserError):
                override(SMOKE_SSD, [setting])
        for setting in ("short_side=2000", "short_sides=80,2000", "neck=c5", "neck=fpn", "anchors=0"):
            with pytest.raises(UserError):
                override(SMOKE_FRCNN, [setting])
        with pytest.raises(UserError, match="head_bn"):
            override(RECIPES["faster_rcnn"]["fpn"], ["head_bn=true"])

    def test_rate_follows_the_batch(self, devkit, backbone, tmp_path, capsys):
        assert finetune.main(finetune_args(devkit, backbone, tmp_path, "ssd300", "--set", "batch=4")) == 0
        (cell,) = tmp_path.rglob("cell.json")
        assert json.loads((cell.parent / "recipe.json").read_text())["recipe"]["lr"] == 2 * SMOKE_SSD.lr
        line = "batch 2 → 4: lr scaled with it, 0.002 → 0.004"
        assert line in capsys.readouterr().out
        assert any(note.startswith(line) for note in json.loads(cell.read_text())["notes"])
        for settings in (["batch=4", "lr=0.002"], ["batch=2"], ["iterations=9"]):
            recipe = override(SMOKE_SSD, settings)
            assert finetune.scale_rate(SMOKE_SSD, recipe, settings) == (recipe, "")

    def test_evaluates_during_training_and_changes_nothing(self, devkit, backbone, tmp_path):
        logs, weights = {}, []
        for out, more in (("a", ()), ("b", ("--every", "1"))):
            assert finetune.main(finetune_args(devkit, backbone, tmp_path / out, "faster_rcnn", *more)) == 0
            (log,) = (tmp_path / out).rglob("log.jsonl")
            logs[out] = [json.loads(line) for line in log.read_text().splitlines()]
            weights.append(torch.load(log.parent / "weights.pt")["model"])
            assert not (log.parent / "best.pt").exists()
        assert [line["iteration"] for line in logs["b"] if "eval" in line] == [1, 2]
        assert set(logs["b"][-1]["eval"]) >= {"mAP", "mAP_area"} and not any("eval" in x for x in logs["a"])
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    def test_eval_only(self, devkit, backbone, tmp_path, monkeypatch):
        """The test images are detected and scored again; of the training images none is decoded."""
        arguments = finetune_args(devkit, backbone, tmp_path, "ssd300", "--set", "iterations=6")
        with pytest.raises(UserError, match="no finished training"):
            finetune.main([*arguments, "--eval-only"])
        assert finetune.main(arguments) == 0
        (cell,) = tmp_path.rglob("cell.json")
        before = {name: (cell.parent / name).read_bytes() for name in ("predictions.json", "images.npz")}
        weights = (cell.parent / "weights.pt").stat().st_mtime_ns
        (cell.parent / "model.json").unlink()
        (cell.parent / "predictions.json").write_text("[]")
        monkeypatch.setattr("backbench.detection.data.read_rgb", None)
        assert finetune.main([*arguments, "--eval-only"]) == 0
        assert (cell.parent / "weights.pt").stat().st_mtime_ns == weights
        assert before == {name: (cell.parent / name).read_bytes() for name in before}
        assert (cell.parent / "model.json").exists()

    @pytest.mark.parametrize(
        ("head_bn", "device", "processes", "micro", "synchronised", "seen"),
        [
            (True, "cuda", 4, 2, True, 8),  # 2 a process, accumulated twice
            (True, "cuda", 8, 2, True, 16),
            (True, "cuda", 1, 2, False, 2),
            (True, "cpu", 8, 2, False, 2),
            (True, "cuda", 1, 0, False, 16),
            (False, "cuda", 8, 2, False, 16),
        ],
    )
    def test_whose_batch_norm_is_synchronised(
        self, monkeypatch, head_bn, device, processes, micro, synchronised, seen
    ):
        monkeypatch.setattr(finetune, "world", lambda: processes)
        notes = []
        recipe = replace(SMOKE_FRCNN, head_bn=head_bn, batch=16, micro_batch=micro, freeze="none")
        model = finetune.build(
            Backbone(Trunk("resnet18_half"), "resnet18_half", "a", "a", "", "", ""),
            recipe,
            2,
            SimpleNamespace(note=notes.append),
            torch.device(device),
        )
        kinds = {type(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)}
        assert kinds == ({nn.SyncBatchNorm} if synchronised else {nn.BatchNorm2d})
        assert any(note.startswith(f"batch norm sees {seen} images at once") for note in notes) == (seen < 16)

    @pytest.mark.parametrize("settings", [("neck=fpn", "anchors=8,16,32,64,128"), ("head_bn=true",)])
    def test_variants_of_faster_rcnn(self, devkit, backbone, tmp_path, settings):
        small = ("fpn_width=16", "head_width=32", "short_sides=64,80,96", "decay_biases=true", *settings)
        more = [part for setting in small for part in ("--set", setting)]
        assert finetune.main(finetune_args(devkit, backbone, tmp_path, "faster_rcnn", *more)) == 0
        (cell,) = tmp_path.rglob("cell.json")
        model, recipe, classes = load_detector(cell.parent)
        assert recipe.short_sides == (64, 80, 96) and classes == ["ball", "cube"]
        assert model.neck == recipe.neck

    def test_cells_of_an_earlier_scoring_are_scored_again_and_not_trained(
        self, devkit, backbone, tmp_path, monkeypatch, capsys
    ):
        arguments = finetune_args(devkit, backbone, tmp_path, "ssd300")
        with monkeypatch.context() as patch:
            patch.setattr(keys, "PROTOCOLS", {})
            assert finetune.main(arguments) == 0
        (cell,) = tmp_path.rglob("cell.json")
        before = json.loads(cell.read_text())
        kept = {name: (cell.parent / name).stat().st_mtime_ns for name in ("weights.pt", "predictions.json")}
        assert finetune.main(arguments) == 0
        after = json.loads(cell.read_text())
        assert [one["inputs"]["score"]["protocol"] for one in (before, after)] == [1, 3]
        assert after["metrics"] == before["metrics"] and after["keys"]["predict"] == before["keys"]["predict"]
        assert kept == {name: (cell.parent / name).stat().st_mtime_ns for name in kept}
        assert "finished already" not in capsys.readouterr().out


class TestClassNotes:
    def test_name_classes_of_one_set_alone(self, devkit, backbone):
        train_set, test_set = open_detection(f"voc:{devkit},classes=ball+cube+cone")
        assert class_notes(train_set, test_set) == []
        test_set.truth[1].labels[1] = 2  # of the two cubes the other is difficult
        assert class_notes(train_set, test_set) == [
            "1 × class without a training object: its AP can only be 0 (cone)",
            "1 × class without a test object that counts: left out of the mean (cube)",
        ]

    def test_are_said_before_training(self, devkit, backbone, tmp_path, monkeypatch, capsys):
        """With what the data's rules did."""
        file = devkit / "Annotations/000001.xml"
        file.write_text(file.read_text().replace("cube", "cubb").replace("<width>60", "<width>61"))

        class Training(Exception):
            pass

        def begins(*args, **kwargs):
            raise Training

        monkeypatch.setattr(finetune, "train", begins)
        with pytest.raises(Training):
            finetune.main(finetune_args(devkit, backbone, tmp_path, "ssd300"))
        said = capsys.readouterr().out.splitlines()
        assert "note: 1 × class without a test object that counts: left out of the mean (cubb)" in said
        wrong = "1 × wrong size in the XML: the image's own taken (first: 000001.xml, 61 × 80 for 60 × 80)"
        assert f"note: training data: {wrong}" in said


class TestNanGuard:
    def test_names_image_and_box(self, devkit, backbone, tmp_path, monkeypatch):
        def spoil(recipe):
            return lambda model, batch, rng: {"loss_box": model(batch["images"])[0].sum() * float("nan")}

        monkeypatch.setitem(finetune.STEPS, "ssd300", spoil)
        with pytest.raises(UserError, match=r"not finite .*00000\d \(smallest box: (ball|cube) \d"):
            finetune.main(finetune_args(devkit, backbone, tmp_path, "ssd300"))

    @pytest.mark.parametrize("recipe", [SMOKE_SSD, SMOKE_FRCNN])
    @pytest.mark.parametrize("bad", [[5, 5, 5, 9], [4, 4, np.nan, 9]])
    def test_refuses_a_box_without_area(self, devkit, backbone, recipe, bad):
        images = open_detection(f"voc:{devkit}")[0]
        images.boxes[2] = np.array([[0, 0, 40, 40], bad], np.float32)
        images.labels[2] = np.array([0, 1])
        images.difficult[2] = np.zeros(2, bool)
        data = TrainViews(images, replace(recipe, **({"crop": False} if recipe is SMOKE_SSD else {})), MEAN)
        with pytest.raises(UserError, match=r"000002.jpg: 000002 \(smallest box: cube "):
            data.batch([2], [np.random.default_rng(0)])


class TestShortSides:
    def test_are_drawn(self, devkit, backbone):
        recipe = replace(SMOKE_FRCNN, short_sides=(48, 60, 96), long_side=200)
        data = TrainViews(open_detection(f"voc:{devkit}")[0], recipe, MEAN)
        sides = [min(data.batch([0], [np.random.default_rng(k)])["sizes"][0]) for k in range(20)]
        assert set(sides) == {48, 60, 96}
