"""Detection as a whole: batches, result files, the command lines, resuming, prediction."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from common.backbone import save_backbone
from common.data import open_detection
from common.data.types import DetectionSet
from common.engine.loader import MicroBatches, Positions, make_loader
from common.errors import UserError
from common.metrics.average_precision import Boxes
from common.recipe import override
from common.trunk import Classifier, Trunk
from detection import evaluate, finetune
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

    def test_recipe_fields(self):
        for recipes in RECIPES.values():
            assert list(recipes) == ["smoke", "tiny", "mini", "paper"]
            for recipe in recipes.values():
                recipe.check()
        for setting in ("expand=0.5", "nms=0", "freeze=layer9", "top=0"):
            with pytest.raises(UserError):
                override(SMOKE_SSD, [setting])
        with pytest.raises(UserError):
            override(SMOKE_FRCNN, ["short_side=2000"])


def test_predictions_do_not_depend_on_the_batch(devkit, backbone):
    images: DetectionSet = open_detection(f"voc:{devkit}")[1]
    torch.manual_seed(0)
    recipe = replace(SMOKE_FRCNN, precision="fp32", score=0.0)
    model = FasterRCNN(half_trunk(), 2, MEAN, STD, anchors=(22, 35), roi_size=5, roi_batch=16, top=5)
    a, b = (predict(model, images, replace(recipe, test_batch=n), torch.device("cpu")) for n in (1, 4))
    assert np.array_equal(a.image, b.image) and np.allclose(a.score, b.score, atol=1e-5)
