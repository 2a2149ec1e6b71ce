"""Detection as a whole: batches, result files, the command lines, resuming, prediction."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from common.backbone import save_backbone
from common.data import open_detection
from common.data.types import DetectionSet
from common.engine.loader import MicroBatches, Positions, make_loader
from common.errors import UserError
from common.metrics.average_precision import Boxes
from common.recipe import override
from common.trunk import Classifier, Trunk
from detection import evaluate, finetune
from detection import predict as predict_script
from detection.build import load_detector
from detection.data import TrainViews
from detection.detect import predict
from detection.faster_rcnn import FasterRCNN
from detection.recipes import RECIPES
from detection.results import image_index, read_results, write_results

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMOKE_SSD, SMOKE_FRCNN = RECIPES["ssd300"]["smoke"], RECIPES["faster_rcnn"]["smoke"]


def half_trunk(seed=0):
    torch.manual_seed(seed)
    return Trunk("resnet18_half")


@pytest.fixture
def devkit(tmp_path):
    """A small VOC-layout folder with two classes of its own."""
    root, rng = tmp_path / "shapes", np.random.default_rng(0)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    names = [f"{k:06d}" for k in range(10)]
    for k, name in enumerate(names):
        width, height = ((80, 60), (60, 80))[k % 2]
        image, objects = rng.integers(0, 60, (height, width, 3)).astype(np.uint8), []
        for label in ("ball", "cube")[: 1 + k % 2]:
            x, y = rng.integers(0, 30, 2)
            image[y : y + 25, x : x + 25] = (220, 40, 40) if label == "ball" else (40, 40, 220)
            objects.append(
                f"<object><name>{label}</name><difficult>{int(k == 9 and label == 'cube')}</difficult><bndbox>"
                f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + 25}</xmax><ymax>{y + 25}</ymax></bndbox></object>"
            )
        cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), image[..., ::-1])
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation>{size}{''.join(objects)}</annotation>"
        )
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(names[:6]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(names[6:]))
    return root


@pytest.fixture
def backbone(tmp_path, monkeypatch):
    """A backbone file with statistics that count as trained."""
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")
    torch.manual_seed(0)
    model = Classifier(Trunk("resnet18_half"), 3)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    facts = {
        "arch": "resnet18_half",
        "num_classes": 3,
        "method": "cutmix",
        "seed": 5,
        "mean": MEAN,
        "std": STD,
    }
    save_backbone(
        tmp_path / "cutmix.pt", model, **{k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}
    )
    return tmp_path / "cutmix.pt"


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


class TestResults:
    def test_round_trip(self, tmp_path):
        rng = np.random.default_rng(0)
        low = rng.uniform(0, 50, (20, 2))
        found = Boxes(
            np.sort(rng.integers(0, 3, 20)),
            rng.integers(0, 4, 20),
            np.hstack([low, low + rng.uniform(1, 90, (20, 2))]),
            rng.random(20),
        )
        write_results(tmp_path / "r.json", found, ["a", "b/c", "d"])
        back = read_results(tmp_path / "r.json", ["a", "b/c", "d"], 4)
        assert np.array_equal(back.image, found.image) and np.array_equal(back.label, found.label)
        assert (
            np.abs(back.box - found.box).max() <= 0.0101 and np.abs(back.score - found.score).max() <= 5.1e-7
        )
        first = json.loads((tmp_path / "r.json").read_text())[0]
        assert set(first) == {"image_id", "category_id", "bbox", "score"}
        assert first["category_id"] == found.label[0] + 1

    def test_empty(self, tmp_path):
        nothing = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
        write_results(tmp_path / "r.json", nothing, ["a"])
        assert len(read_results(tmp_path / "r.json", ["a"], 1).image) == 0

    def test_image_numbers(self):
        assert image_index(["000012", "2008_000001"])[12] == 0
        assert image_index(["000012", "2008_000001"])[2008000001] == 1
        assert 1 not in image_index(["a1", "b1"])

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            (
                {"image_id": "x", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1},
                "detection 1: image or key 'x'",
            ),
            ({"image_id": "a", "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}, "category_id is 1 to 2"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, -1, 1], "score": 1}, "not negative"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1], "score": 1}, "detection 1"),
            ({"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1]}, "image or key 'score'"),
            (["a"], "detection 1"),
        ],
    )
    def test_bad_entries(self, tmp_path, entry, message):
        (tmp_path / "r.json").write_text(json.dumps([entry]))
        with pytest.raises(UserError, match=message):
            read_results(tmp_path / "r.json", ["a"], 2)


class TestEvaluate:
    def perfect(self, devkit):
        """Truth as COCO results of every test image, difficult objects included."""
        images = open_detection(f"voc:{devkit}")[1]
        return images, [
            {
                "image_id": name,
                "category_id": int(c) + 1,
                "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()],
                "score": 0.9,
            }
            for name, boxes, labels in zip(images.ids, images.boxes, images.labels)
            for b, c in zip(boxes, labels)
        ]

    def test_json_and_text_files(self, devkit, backbone, tmp_path, capsys):
        images, entries = self.perfect(devkit)
        entries[0]["bbox"] = [0, 0, 5, 5]  # a miss
        (tmp_path / "found.json").write_text(json.dumps(entries))
        folder = tmp_path / "comp"
        folder.mkdir()
        for c, name in enumerate(images.classes):
            lines = []
            for e in entries:
                x, y, w, h = e["bbox"]
                if e["category_id"] == c + 1:
                    lines.append(f"{e['image_id']} {e['score']} {x + 1} {y + 1} {x + w} {y + h}")
            (folder / f"comp3_det_test_{name}.txt").write_text("\n".join(lines))
        scores = []
        for source in (tmp_path / "found.json", folder):
            arguments = [
                "--devkit",
                str(devkit),
                "--detections",
                str(source),
                "--json",
                str(tmp_path / "s.json"),
            ]
            assert evaluate.main(arguments) == 0
            scores.append(json.loads((tmp_path / "s.json").read_text()))
        assert scores[0] == scores[1]
        assert images.classes == ["ball", "cube"]
        assert scores[0]["AP_11point"]["cube"] == pytest.approx(1)
        assert scores[0]["classes"]["cube"]["objects"] == 1  # one of the two is difficult
        # of four balls three are found, one of the four claims is wrong and all tie: order of the images
        assert scores[0]["AP_area"]["ball"] == pytest.approx(3 / 4 * 3 / 4)
        assert scores[0]["mAP_area"] == pytest.approx((1 + 9 / 16) / 2)
        assert "| ball | " in capsys.readouterr().out

    def test_bad_input(self, devkit, backbone, tmp_path):
        base = ["--devkit", str(devkit), "--detections"]
        with pytest.raises(UserError, match="no such file"):
            evaluate.main([*base, str(tmp_path / "none.json")])
        with pytest.raises(UserError, match="no file comp3_det_test_CLASS"):
            evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp3_det_test_ball.txt").write_text("000006 0.5 1 2 3\n")
        with pytest.raises(UserError, match=r"line 1: .* is not"):
            evaluate.main([*base, str(tmp_path)])
        (tmp_path / "comp3_det_test_ball.txt").write_text("000001 0.5 1 2 3 4\n")
        with pytest.raises(UserError, match="'000001' is not in the split"):
            evaluate.main([*base, str(tmp_path)])


def finetune_args(devkit, backbone, out, detector, *more):
    return [
        *(
            "--backbone",
            str(backbone),
            "--detector",
            detector,
            "--data",
            f"voc:{devkit}",
            "--recipe",
            "smoke",
        ),
        *("--set", "iterations=2", "--set", "precision=fp32", "--out", str(out), "--device", "cpu", *more),
    ]


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

    def test_eval_only(self, devkit, backbone, tmp_path):
        arguments = finetune_args(devkit, backbone, tmp_path, "ssd300")
        with pytest.raises(UserError, match="no finished training"):
            finetune.main([*arguments, "--eval-only"])
        assert finetune.main(arguments) == 0
        (cell,) = tmp_path.rglob("cell.json")
        before = {name: (cell.parent / name).read_bytes() for name in ("predictions.json", "images.npz")}
        weights = (cell.parent / "weights.pt").stat().st_mtime_ns
        (cell.parent / "model.json").unlink()
        (cell.parent / "predictions.json").write_text("[]")
        assert finetune.main([*arguments, "--eval-only"]) == 0
        assert (cell.parent / "weights.pt").stat().st_mtime_ns == weights
        assert before == {name: (cell.parent / name).read_bytes() for name in before}
        assert (cell.parent / "model.json").exists()

    @pytest.mark.parametrize("settings", [("neck=fpn", "anchors=8,16,32,64,128"), ("head_bn=true",)])
    def test_variants_of_faster_rcnn(self, devkit, backbone, tmp_path, settings):
        small = ("fpn_width=16", "head_width=32", "short_sides=64,80,96", "decay_biases=true", *settings)
        more = [part for setting in small for part in ("--set", setting)]
        assert finetune.main(finetune_args(devkit, backbone, tmp_path, "faster_rcnn", *more)) == 0
        (cell,) = tmp_path.rglob("cell.json")
        model, recipe, classes = load_detector(cell.parent)
        assert recipe.short_sides == (64, 80, 96) and classes == ["ball", "cube"]
        assert model.neck == recipe.neck


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

    def test_bad_input(self, trained, devkit, tmp_path):
        picture = str(devkit / "JPEGImages/000006.jpg")
        (tmp_path / "note.jpg").write_text("no picture")
        (tmp_path / "empty").mkdir()
        for run, given, message in (
            (trained.parent, picture, "no weights.pt in it; did you mean .*seed0"),
            (tmp_path / "none", picture, "no weights.pt in it; give the folder"),
            (trained, str(tmp_path / "note.jpg"), "note.jpg: not a readable image"),
            (trained, str(tmp_path / "gone.jpg"), "gone.jpg: no such file"),
            (trained, str(tmp_path / "empty"), "no picture in this folder"),
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


def test_predictions_do_not_depend_on_the_batch(devkit, backbone):
    images: DetectionSet = open_detection(f"voc:{devkit}")[1]
    torch.manual_seed(0)
    recipe = replace(SMOKE_FRCNN, precision="fp32", score=0.0)
    model = FasterRCNN(half_trunk(), 2, MEAN, STD, anchors=(22, 35), roi_size=5, roi_batch=16, top=5)
    a, b = (predict(model, images, replace(recipe, test_batch=n), torch.device("cpu")) for n in (1, 4))
    assert np.array_equal(a.image, b.image) and np.allclose(a.score, b.score, atol=1e-5)
