"""What others' detections are compared with: objects as published, classes as the detector numbered them."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from shapes import finetune_args
from test_average_precision import loop_ap

from backbench.common.base.errors import UserError
from backbench.common.data import open_detection
from backbench.common.metrics.average_precision import Boxes
from backbench.detection import evaluate, finetune, report, scores
from backbench.detection.data import class_notes
from backbench.detection.mistakes import draw_mistakes, find_mistakes

pytest_plugins = ["shapes"]  # its fixtures


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


def zoo(folder, **splits):
    """A VOC-layout folder; of each split, by image, its objects as (class, corners) or (class, corners, difficult)."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(images))
        for name, objects in images.items():
            Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / f"{name}.jpg")
            rows = [
                f"<object><name>{row[0]}</name><difficult>{int(row[2]) if row[2:] else 0}</difficult><bndbox>"
                + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), row[1]))
                + "</bndbox></object>"
                for row in objects
            ]
            (folder / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><size><width>100</width><height>80</height></size>{''.join(rows)}</annotation>"
            )
    return folder


def scored(folder, detections, *more):
    file = folder.parent / "scores.json"
    assert (
        evaluate.main(["--devkit", str(folder), "--detections", str(detections), *more, "--json", str(file)])
        == 0
    )
    return json.loads(file.read_text())


def as_json(file, rows, numbers):
    """Detections (image, class, corners, score) as COCO result JSON; `numbers` are the classes' category ids."""
    entries = [
        {
            "image_id": image,
            "category_id": numbers[name],
            "bbox": [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1],
            "score": score,
        }
        for image, name, (x0, y0, x1, y1), score in rows
    ]
    file.write_text(json.dumps(entries))
    return file


def as_text(folder, rows):
    folder.mkdir()
    for image, name, corners, score in rows:
        with (folder / f"comp3_det_test_{name}.txt").open("a") as file:
            file.write(f"{image} {score} {' '.join(map(str, corners))}\n")
    return folder


ODD = [(0, 0, 9, 9), (5, 5, 5, 14), (91, 71, 110, 90)]  # from 0, a pixel wide, out of 100 × 80


@pytest.mark.parametrize("preset", ["voc-devkit", "py-faster-rcnn", "detectron2"])
def test_the_truth_itself_scores_100(tmp_path, preset):
    objects = [("ant", box) for box in ODD]
    folder = zoo(tmp_path / "zoo", trainval={"a": [("ant", (1, 1, 9, 9))]}, test={"b": objects})
    rows = [("b", name, box, 0.5) for name, box in objects]
    for found in (as_json(tmp_path / "r.json", rows, {"ant": 1}), as_text(tmp_path / "comp", rows)):
        result = scored(folder, found, "--coco", "--preset", preset)
        assert result["mAP_11point"] == pytest.approx(1) and result["mAP_area"] == pytest.approx(1)
        assert result["COCO"]["AP"] == pytest.approx(1)
        assert result["classes"]["ant"]["objects"] == 3 and result["data"] == []


def test_small_boxes_from_0_at_iou_75(tmp_path):
    """Of 90 boxes of 4 × 4 pixels from the first row on, moved truth loses those at the border."""
    images = {
        f"{k:02d}": [("ant", (x, y, x + 3, y + 3)) for x, y in ((0, 10 * k), (10 * k, 0), (30, 30))]
        for k in range(1, 8)
    }
    folder = zoo(tmp_path / "zoo", trainval={"a": [("ant", (1, 1, 9, 9))]}, test=images)
    rows = [(image, name, box, 0.5) for image, objects in images.items() for name, box in objects]
    for found in (as_json(tmp_path / "r.json", rows, {"ant": 1}), as_text(tmp_path / "comp", rows)):
        result = scored(folder, found, "--preset", "detectron2")
        assert result["detectron2"] == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})


@pytest.mark.parametrize(
    "preset, inclusive, plus_one, truth_less",
    [
        ("voc-devkit", True, True, 0),
        ("py-faster-rcnn", False, True, 0),
        ("detectron2", False, True, 0),
        ("ssd.pytorch", False, False, 1),
    ],
)
def test_scores_are_the_tools_on_the_files_corners(tmp_path, preset, inclusive, plus_one, truth_less):
    """Boxes that leave the image, have no area or run backwards, as each tool reads them from the XML."""
    rng = np.random.default_rng(0)
    names, images, rows = ["ant", "bee"], {}, []
    for i in range(8):
        low = rng.integers(-3, 90, (6, 2))
        corners = np.hstack([low, low + rng.integers(-2, 16, (6, 2))])
        objects = [(names[rng.integers(2)], tuple(box), bool(rng.random() < 0.2)) for box in corners.tolist()]
        images[f"{i}"] = objects
        for name, box, _ in objects:
            for _ in range(2):
                moved = np.array(box) + rng.integers(-1, 2, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] - 1)
                rows.append((f"{i}", name, tuple(moved.tolist()), float(rng.integers(1, 20) / 20)))
    folder = zoo(tmp_path / "zoo", trainval={"t": [("ant", (1, 1, 9, 9))]}, test=images)
    result = scored(folder, as_text(tmp_path / "comp", rows), "--preset", preset)
    flat = [(int(i), names.index(n), box, hard) for i, objects in images.items() for n, box, hard in objects]
    truth = Boxes(
        *(np.array([row[k] for row in flat]) for k in range(2)),
        np.array([row[2] for row in flat]) - truth_less,
        difficult=np.array([row[3] for row in flat]),
    )
    found = Boxes(
        np.array([int(row[0]) for row in rows]),
        np.array([names.index(row[1]) for row in rows]),
        *(np.array([row[k] for row in rows]) for k in (2, 3)),
    )
    for c, name in enumerate(names):
        eleven, area = loop_ap(found, truth, np.ones(8), c, 0.5, inclusive, plus_one)
        assert 0 < eleven < 1
        assert result["AP_11point"][name] == pytest.approx(eleven, abs=1e-12)
        assert result["AP_area"][name] == pytest.approx(area, abs=1e-12)
    backwards = sum(box[2] < box[0] or box[3] < box[1] for *_, box, _ in flat)
    assert result["data"][0].startswith(f"{backwards} × box with xmin > xmax or ymin > ymax: counts")


def test_names_with_spaces(tmp_path):
    folder = zoo(
        tmp_path / "zoo", trainval={"a": [("ant", (1, 1, 9, 9))]}, test={"a  b 1": [("ant", (1, 1, 9, 9))]}
    )
    result = scored(folder, as_text(tmp_path / "comp", [("a  b 1", "ant", (1, 1, 9, 9), 0.5)]))
    assert result["mAP_area"] == 1 and result["images_without_detections"] == 0


def test_boxes_for_another_size_of_the_image(tmp_path):
    folder = zoo(
        tmp_path / "zoo", trainval={"a": [("ant", (1, 1, 9, 9))]}, test={"b": [("ant", (21, 21, 60, 60))]}
    )
    xml = folder / "Annotations/b.xml"
    xml.write_text(xml.read_text().replace(">100<", ">200<").replace(">80<", ">160<"))
    found = as_json(tmp_path / "r.json", [("b", "ant", (11, 11, 30, 30), 0.5)], {"ant": 1})
    result = scored(folder, found)
    assert result["mAP_area"] == 0 and result["data"] == [
        "1 × box for another size of the image than it has: scored in the XML's pixels (first: b.xml)"
    ]
    result = scored(folder, found, "--rescale")
    assert result["mAP_area"] == 1 and "rescaled to the image's" in result["data"][0]
    for path in (folder / "JPEGImages").glob("[ab].jpg"):
        path.rename(path.with_name("other.jpg"))  # annotations alone are scored too
    result = scored(folder, as_json(tmp_path / "r.json", [("b", "ant", (21, 21, 60, 60), 0.5)], {"ant": 1}))
    assert result["mAP_area"] == 1 and result["data"] == []


ANT, BEE = ("ant", (1, 1, 9, 9)), ("bee", (20, 20, 40, 40))


class TestClassNumbers:
    def test_are_of_the_training_split_too(self, tmp_path):
        """All bees called ant: nothing is right, whether trainval.txt is there or train.txt."""
        for train in ("trainval", "train"):
            folder = zoo(tmp_path / train, **{train: {"a": [ANT, BEE]}, "test": {"b": [BEE]}})
            bees = [("b", "bee", BEE[1], 0.5)]
            for numbers, expected in (({"bee": 1}, 0), ({"bee": 2}, 1)):
                result = scored(folder, as_json(tmp_path / "r.json", bees, numbers))
                assert result["mAP_11point"] == pytest.approx(expected)
                assert list(result["classes"]) == ["ant", "bee"]
            (tmp_path / train / "comp").mkdir()
            assert scored(folder, as_text(tmp_path / train / "comp" / "x", bees))["mAP_area"] == 1

    def test_that_could_mean_anything_are_asked_for(self, tmp_path):
        bees = [("b", "bee", BEE[1], 0.5)]
        alone = zoo(tmp_path / "alone", test={"b": [BEE]})
        other = zoo(tmp_path / "other", trainval={"a": [BEE]}, test={"c": [BEE]}, challenge={"b": [BEE, ANT]})
        found = as_json(tmp_path / "r.json", bees, {"bee": 1})
        with pytest.raises(UserError, match=r"no trainval.txt and no train.txt .* --classes bee"):
            scored(alone, found)
        with pytest.raises(UserError, match=r"classes beyond trainval.txt's.* --classes ant\+bee"):
            scored(other, found, "--split", "challenge")
        assert scored(alone, found, "--classes", "bee+ant")["mAP_area"] == 1
        assert scored(alone, found, "--classes", "ant+bee")["mAP_area"] == 0
        assert scored(alone, as_text(tmp_path / "comp", bees))["mAP_area"] == 1  # named, not numbered
        with pytest.raises(UserError, match="--classes ant: knows no class 'bee'"):
            scored(alone, found, "--classes", "ant")
        with pytest.raises(UserError, match="empty or a doubled name"):
            scored(alone, found, "--classes", "bee+bee")

    def test_of_voc_are_vocs(self, tmp_path):
        cat = ("cat", (1, 1, 9, 9))
        found = as_json(tmp_path / "r.json", [("b", "cat", cat[1], 0.5)], {"cat": 8})
        assert scored(zoo(tmp_path / "a", test={"b": [cat]}), found)["mAP_area"] == 1
        mixed = zoo(tmp_path / "b", trainval={"a": [ANT, cat]}, test={"b": [cat]})
        with pytest.raises(UserError, match=r"category_id is none of the classes' \(1, 2\)"):
            scored(mixed, found)

    def test_of_a_run_are_in_its_folder(self, tmp_path):
        """Splits of other names, and a run on COCO's ids: beside predictions.json stands what it counts."""
        folder = zoo(tmp_path / "zoo", mine={"a": [ANT, BEE]}, trainval={"c": [BEE]}, test={"b": [BEE]})
        bees = [("b", "bee", BEE[1], 0.5)]
        for numbers, facts in (
            ({"bee": 2}, {"classes": ["ant", "bee"]}),
            ({"bee": 90}, {"classes": ["ant", "bee"], "category_ids": [3, 90]}),
        ):
            run = tmp_path / f"run{numbers['bee']}"
            run.mkdir()
            (run / "model.json").write_text(json.dumps(facts))
            assert scored(folder, as_json(run / "predictions.json", bees, numbers))["mAP_area"] == 1
        (run / "model.json").write_text(json.dumps({"classes": ["ant"]}))
        with pytest.raises(UserError, match=r"model.json: knows no class 'bee', of which split test has"):
            scored(folder, run / "predictions.json")


def test_a_cell_scores_every_object_as_published(tmp_path):
    """Also those that training cannot use: swapped corners, or wholly outside; of COCO the object's own area."""
    swapped, outside = (30, 1, 20, 9), (150, 1, 160, 9)
    folder = zoo(
        tmp_path / "zoo",
        trainval={"a": [ANT, BEE, ("bee", swapped)]},
        test={"b": [ANT, ("ant", swapped), ("bee", outside)]},
    )
    train, test = open_detection(f"voc:{folder}")
    truth = scores.truth_of(test)
    assert truth.box.tolist() == [[0, 0, 9, 9], [29, 0, 20, 9], [149, 0, 160, 9]] and truth.area is None
    assert class_notes(train, test) == []  # there is a bee to be missed
    nothing = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
    stats = scores.cell_statistics(nothing, test)
    assert stats["positives"].tolist() == [[2, 1]]
    made = find_mistakes(stats, nothing, truth)
    assert draw_mistakes(tmp_path, made, test) == {"missed": "mistakes_missed.jpg"}
    assert report._summary(replace(train, truth=None))["objects"] == 2
    content = {
        "images": [{"id": 1, "file_name": "b.jpg", "width": 100, "height": 80}],
        "categories": [{"id": 7, "name": "ant"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 7, "bbox": [k, 1, 9, 9], "area": 40.5 - k} for k in (1, 2)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    spec = f"coco:images={folder}/JPEGImages,train={tmp_path}/a.json,val={tmp_path}/a.json"
    assert scores.truth_of(open_detection(spec)[1]).area.tolist() == [39.5, 38.5]


def test_files_of_unknown_classes_are_refused(tmp_path):
    folder = zoo(tmp_path / "zoo", trainval={"a": [ANT, BEE]}, test={"b": [BEE]})
    rows = [("b", "bee", BEE[1], 0.5), ("b", "beetle", BEE[1], 0.5)]
    found = as_text(tmp_path / "comp", rows)
    (found / "comp3_det_val_wasp.txt").write_text("")  # of another split
    with pytest.raises(UserError, match=r"comp3_det_test_beetle.txt: of no class of ant, bee; "):
        scored(folder, found)
    assert scored(folder, found, "--classes", "ant+bee+beetle")["mAP_area"] == 1


def test_a_runs_predictions_score_what_its_cell_says(devkit, backbone, tmp_path):
    """On splits of its own names, of which the scored one lacks a class; one object reaches out of its image."""
    main = devkit / "ImageSets/Main"
    (main / "mine.txt").write_text((main / "trainval.txt").read_text())
    (main / "scored.txt").write_text("000006\n000008\n")  # balls alone
    (main / "trainval.txt").unlink()
    xml = devkit / "Annotations/000006.xml"
    xml.write_text(xml.read_text().replace("<ymin>", "<ymin>-", 1))
    arguments = finetune_args(f"{devkit},train=mine,test=scored", backbone, tmp_path / "out", "ssd300")
    assert finetune.main(arguments) == 0
    (cell,) = (tmp_path / "out").rglob("cell.json")
    rows = [
        (name, "ball", [int(v.text) for v in ElementTree.parse(xml).find("object/bndbox")], 0.5)
        for name in ("000006", "000008")
        for xml in [devkit / "Annotations" / f"{name}.xml"]
    ]
    rows[1][2][2] -= 9  # .64 of the object
    as_json(
        cell.parent / "predictions.json",
        [*rows, ("000008", "cube", (1, 1, 9, 9), 0.9)],
        {"ball": 1, "cube": 2},
    )
    cell.unlink()
    assert finetune.main(arguments) == 0
    result = scored(devkit, cell.parent / "predictions.json", "--split", "scored", "--coco")
    metrics = json.loads(cell.read_text())["metrics"]
    assert list(result["classes"]) == ["ball", "cube"]
    assert metrics["mAP"] == pytest.approx(1) and metrics["AP75"] == pytest.approx(51 / 101)
    assert result["mAP_11point"] == metrics["mAP"] and result["mAP_area"] == metrics["mAP_area"]
    assert [result["COCO"][name] for name in ("AP", "AP75")] == [metrics["AP"], metrics["AP75"]]
