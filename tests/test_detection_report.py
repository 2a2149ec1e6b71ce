"""Detection's evaluation: mistakes by kind, curves, the report of a run, and detection/evaluate.py."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from backbench.common.base.errors import UserError
from backbench.common.data.decode import read_rgb
from backbench.common.data.types import DetectionSet
from backbench.common.metrics import rescore
from backbench.common.metrics.average_precision import IGNORED, PRESETS, RIGHT, Boxes, class_ap, match
from backbench.common.run.cell import Identity, open_run
from backbench.detection import curves as curve
from backbench.detection import evaluate, report, scores
from backbench.detection.mistakes import KINDS, count_mistakes, draw_mistakes, find_mistakes, surest
from backbench.detection.recipes import RECIPES
from backbench.detection.results import read_results, write_results

CATEGORIES = [3, 7, 90]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


def random_case(rng, images=5, classes=3, most=60):
    """Detections and objects on a coarse grid, half of the detections near an object; images in order."""

    def boxes(k):
        corner = rng.integers(0, 4, (k, 2))
        return 10.0 * np.concatenate([corner, corner + rng.integers(1, 4, (k, 2))], 1)

    k, t = rng.integers(0, most), rng.integers(1, 20)
    truth = Boxes(
        rng.integers(0, images, t), rng.integers(0, classes, t), boxes(t), difficult=rng.random(t) < 0.2
    )
    image, label, box = rng.integers(0, images, k), rng.integers(0, classes, k), boxes(k)
    near, like = rng.random(k) < 0.5, rng.integers(0, t, k)
    image[near], box[near] = truth.image[like][near], (truth.box[like] + rng.integers(-3, 4, (k, 4)))[near]
    score = rng.permutation(k) / 64
    order = np.lexsort((-score, image))
    return Boxes(image[order], label[order], box[order], score[order]), truth


def overlap(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def loop_kinds(found, truth, classes):
    """Kind of each detection by falling score of its class, and the missed objects, a detection at a time."""
    kinds, claimed = [], set()
    order = sorted(range(len(found.image)), key=lambda r: (found.label[r], -found.score[r]))
    for r in order:
        here = [t for t in range(len(truth.image)) if truth.image[t] == found.image[r]]
        ious = {t: overlap(found.box[r], truth.box[t]) for t in here}
        own = max((t for t in here if truth.label[t] == found.label[r]), key=ious.get, default=None)
        best = max(ious.values(), default=-1)
        if own is not None and ious[own] >= 0.5:
            if truth.difficult[own]:
                kinds.append(None)
            elif own in claimed:
                kinds.append("duplicate")
            else:
                claimed.add(own)
                kinds.append(None)
        elif best < 0.1:
            kinds.append("background")
        elif own is not None and ious[own] == best:
            kinds.append("localisation")
        else:
            kinds.append("confusion")
    missed = {t for t in range(len(truth.image)) if not truth.difficult[t] and t not in claimed}
    return kinds, missed


def test_mistakes_equal_a_loop():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        found, truth = random_case(rng)
        stats = match(found, truth, 5, 3)
        made = find_mistakes(stats, found, truth)
        kinds, missed = loop_kinds(found, truth, 3)
        assert [None if k < 0 else KINDS[k] for k in made.kind] == kinds
        assert set(made.missed.tolist()) == missed
        for row in np.flatnonzero(made.kind >= 0):
            here = np.flatnonzero(truth.image == made.found.image[row])
            if len(here):
                iou = overlap(made.found.box[row], truth.box[made.target[row]])
                assert made.iou[row] == pytest.approx(iou)
                if KINDS[made.kind[row]] != "duplicate":
                    assert iou == max(overlap(made.found.box[row], truth.box[t]) for t in here)
            else:
                assert made.target[row] == -1
        seen |= set(kinds)
        counts = count_mistakes(stats, made)
        assert {k: v["all"] for k, v in counts.items()} == {
            **{k: kinds.count(k) for k in KINDS},
            "missed": len(missed),
        }
    assert seen == {None, *KINDS[:4]}


def test_what_mistakes_cost():
    truth = Boxes(
        np.array([0, 0]),
        np.array([0, 0]),
        np.array([[0, 0, 10, 10], [50, 50, 60, 60.0]]),
        difficult=np.zeros(2, bool),
    )
    found = Boxes(
        np.zeros(3, int),
        np.zeros(3, int),
        np.array([[80, 80, 90, 90], [0, 0, 10, 10], [0, 0, 10, 9.0]]),
        np.array([0.9, 0.8, 0.7]),
    )
    stats = match(found, truth, 1, 1)
    counts = count_mistakes(stats, find_mistakes(stats, found, truth))
    assert counts["background"] == {"all": 1, "sure": 1, "mAP_without": pytest.approx(6 / 11)}
    assert counts["duplicate"]["all"] == 1 and counts["duplicate"]["sure"] == 0  # two objects: the two surest
    assert counts["missed"] == {"all": 1, "sure": None, "mAP_without": pytest.approx(0.5)}
    assert rescore("detection", stats)["mAP"][0] == pytest.approx(3 / 11)


def picture_set(folder, sizes=((90, 60), (60, 90), (80, 80), (70, 50), (64, 64))):
    """Grey images 00 … with the objects of `random_case` to be filled in."""
    paths = []
    for k, size in enumerate(sizes):
        paths.append(folder / f"{k:02d}.png")
        Image.new("RGB", size, (128, 128, 128)).save(paths[-1])
    return paths, np.array(sizes)


def as_set(folder, truth, classes=("ant", "bee", "cow")):
    paths, sizes = picture_set(folder)
    rows = [np.flatnonzero(truth.image == i) for i in range(5)]
    return DetectionSet(
        *("bugs", list(classes), [f"{k:02d}" for k in range(5)], paths, sizes),
        [truth.box[r].astype(np.float32) for r in rows],
        [truth.label[r] for r in rows],
        [truth.difficult[r] for r in rows],
    )


def test_pictures(tmp_path):
    truth = Boxes(
        np.array([0, 1]),
        np.array([0, 1]),
        np.array([[10, 10, 40, 40], [5, 5, 25, 25.0]]),
        difficult=np.zeros(2, bool),
    )
    found = Boxes(
        *(np.array([0, 0, 2]), np.array([0, 0, 2])),
        np.array([[10, 25, 40, 55], [10, 26, 40, 55], [20, 20, 60, 60.0]]),
        np.array([0.9, 0.8, 0.7]),
    )
    images = as_set(tmp_path, truth)
    made = find_mistakes(match(found, truth, 5, 3), found, truth)
    assert surest(made, "localisation") == [0] and surest(made, "missed") == [0, 1]  # one an image
    (tmp_path / "mistakes_duplicate.jpg").write_bytes(b"of an earlier run")
    written = draw_mistakes(tmp_path, made, images)
    assert written == {k: f"mistakes_{k}.jpg" for k in ("localisation", "background", "missed")}
    assert not (tmp_path / "mistakes_duplicate.jpg").exists()
    before = {name: (tmp_path / name).read_bytes() for name in written.values()}
    assert draw_mistakes(tmp_path, made, images) == written
    assert before == {name: (tmp_path / name).read_bytes() for name in written.values()}
    sheet = read_rgb(tmp_path / "mistakes_localisation.jpg").astype(int)
    assert sheet.shape == (147 + 34, 220, 3)  # 90 × 60 made 220 wide, and its caption
    red = (sheet[..., 0] > 170) & (sheet[..., 1] < 110)
    blue = (sheet[..., 2] > 200) & (sheet[..., 0] < 130)
    for mask, box in ((red, [10, 25, 40, 55]), (blue, [10, 10, 40, 40])):
        y, x = np.nonzero(mask)
        edges = np.array([x.min(), y.min(), x.max(), y.max()]) * 90 / 220
        assert np.abs(edges - box).max() < 2
    both = read_rgb(tmp_path / "mistakes_missed.jpg")
    assert both.shape[1] == 2 * 220 + 4 and both.shape[0] == 220 + 34  # the second image is upright


def test_curves_equal_a_loop():
    rng = np.random.default_rng(3)
    for _ in range(20):
        found, truth = random_case(rng)
        stats = match(found, truth, 5, 3)
        data = curve.curves(stats, ["ant", "bee", "cow"])
        for c, name in enumerate(("ant", "bee", "cow")):
            objects = stats["positives"][:, c].sum()
            assert (name in data) == (objects > 0)
            if not objects:
                continue
            points, right, counted = [], 0, 0
            for row in np.flatnonzero((stats["label"] == c) & (stats["mark"] != IGNORED)):
                right, counted = right + (stats["mark"][row] == RIGHT), counted + 1
                points.append((right / objects, right / counted, stats["score"][row]))
            for k, at in enumerate(np.linspace(0, 1, 101)):
                beyond = [p for p in points if p[0] >= at]
                best = max((p[1] for p in beyond), default=0.0)
                assert data[name]["precision"][k] == pytest.approx(best, abs=1e-6)
                score = next((p[2] for p in beyond if p[1] == best), None)
                assert data[name]["score"][k] == (None if score is None else pytest.approx(score, abs=1e-6))
    svg = curve.picture({"a<b": data[next(iter(data))]}, {"a<b": 0.25})
    assert svg.startswith("<svg ") and "a&lt;b" in svg and ">25.0<" in svg


def coco_json(folder, truth, ids, categories):
    """Truth as an instance file, difficult objects as crowd regions."""
    size = truth.box[:, 2:] - truth.box[:, :2]
    file = folder / "instances.json"
    content = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 90, "height": 90} for i in ids],
        "categories": [{"id": c, "name": f"class{c}"} for c in categories],
        "annotations": [
            {
                "id": k + 1,
                "image_id": ids[truth.image[k]],
                "category_id": categories[truth.label[k]],
                "bbox": [*truth.box[k, :2].tolist(), *size[k].tolist()],
                "area": float(size[k].prod()),
                "iscrowd": int(truth.difficult[k]),
            }
            for k in range(len(truth.image))
        ],
    }
    file.write_text(json.dumps(content))
    return file


def pycoco(file, results):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(file))
        judge = COCOeval(gt, gt.loadRes(str(results)), "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    return judge.stats[:6], np.where(precision[0, 0] < 0, np.nan, precision.mean((0, 1)))


def test_a_cells_ap_is_pycocotools(tmp_path):
    rng = np.random.default_rng(5)
    for case in range(8):
        found, truth = random_case(rng, most=80)
        if not len(found.image):
            continue
        found.score = rng.random(len(found.image)).round(1)  # many ties
        images = as_set(tmp_path, truth)
        file = coco_json(tmp_path, scores.truth_of(images), [0, 1, 2, 3, 4], CATEGORIES)
        results = tmp_path / f"r{case}.json"
        write_results(results, found, [0, 1, 2, 3, 4], CATEGORIES)
        expected, _ = pycoco(file, results)
        read = read_results(results, images.ids, 3, CATEGORIES)
        metrics = scores.scores(scores.cell_statistics(read, images))
        ours = [metrics[k] for k in ("AP", "AP50", "AP75")]
        np.testing.assert_allclose([-1 if v is None else v for v in ours], expected[:3], rtol=0, atol=1e-9)


def test_evaluate_is_pycocotools_on_tied_scores_unsorted_ids_and_boxes_at_the_ends_of_sizes(tmp_path):
    rng = np.random.default_rng(0)
    ids, annotations, results = rng.permutation(500)[:20].tolist(), [], []
    for image in ids:
        for _ in range(5):
            corner, side = rng.uniform(0, 400, 2), int(rng.choice([31, 32, 96, 97]))
            where = {"image_id": image, "category_id": int(rng.choice(CATEGORIES))}
            crowd = int(rng.random() < 0.1)
            box = {"bbox": [*corner.tolist(), side, side], "area": float(side**2), "iscrowd": crowd}
            annotations.append({"id": len(annotations) + 1, **where, **box})
            for shift in (0, side / 3, side):
                box = {"bbox": [*(corner + shift).tolist(), side, side], "score": round(rng.random(), 1)}
                results.append({**where, **box})
    content = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 600, "height": 600} for i in ids],
        "categories": [{"id": c, "name": f"class{c}"} for c in CATEGORIES],
        "annotations": annotations,
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(results))
    files = ["--annotations", str(tmp_path / "truth.json"), "--detections", str(tmp_path / "found.json")]
    assert evaluate.main([*files, "--json", str(tmp_path / "scores.json")]) == 0
    expected, _ = pycoco(tmp_path / "truth.json", tmp_path / "found.json")
    ours = json.loads((tmp_path / "scores.json").read_text())["COCO"]
    found = [ours[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_statistics_without_cocos_marks_are_still_read():
    found, truth = random_case(np.random.default_rng(6))
    stats = match(found, truth, 5, 3)
    assert list(rescore("detection", stats, np.ones((2, 5)))) == ["mAP", "mAP_area"]


def test_the_report_of_a_run(tmp_path):
    found, truth = random_case(np.random.default_rng(8), most=90)
    images = replace(as_set(tmp_path, truth), categories=CATEGORIES)
    recipe = RECIPES["ssd300"]["smoke"]
    run = open_run(
        *(tmp_path / "run",),
        **{"task": "detection", "data": "bugs", "model": "ssd300", "recipe": recipe, "recipe_label": "smoke"},
        **{"backbone": None, "seed": 0, "train_fingerprint": "a", "test_fingerprint": "b"},
        identity=Identity("bugs", "detection", "ssd300", "smoke", "none", 0),
    )
    with run.stage("train", files=[]):
        pass
    with run.stage("predict", files=["predictions.json"]):
        write_results(run.folder / "predictions.json", found, images.ids, CATEGORIES)
    cost = {"iterations": 1, "images": 1, "seconds": 0.0}
    metrics = report.finish(run, images, images, torch.device("cpu"), cost)
    cell = json.loads((run.folder / "cell.json").read_text())
    assert cell["metrics"] == metrics and set(metrics) == {"mAP", "mAP_area", "AP", "AP50", "AP75"}
    with np.load(run.folder / "images.npz") as file:
        again = rescore("detection", {name: file[name] for name in file.files})
    assert {name: float(value[0]) for name, value in again.items()} == metrics
    content = json.loads((run.folder / "report.json").read_text())
    assert set(content["mistakes"]) == set(KINDS) and content["sizes"]["AP"]["AP"] == pytest.approx(
        metrics["AP"]
    )
    assert content["category_ids"] == CATEGORIES
    text = (run.folder / "report.md").read_text()
    for name in ["precision_recall.svg", *content["mistake pictures"].values()]:
        assert f"]({name})" in text and (run.folder / name).stat().st_size > 200
    assert "| ant |" in text and "| localisation |" in text and "| small (area to 32²) |" in text


def test_evaluate_coco_annotations(tmp_path, capsys):
    rng, ids = np.random.default_rng(9), [139, 285, 632, 724, 776]
    for _ in range(6):
        found, truth = random_case(rng, most=90)
        found.score = found.score.round(1)
        file = coco_json(tmp_path, truth, ids, CATEGORIES)
        entries = [
            {
                "image_id": ids[i],
                "category_id": CATEGORIES[c],
                "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()],
                "score": float(s),
            }
            for i, c, b, s in zip(found.image, found.label, found.box, found.score)
        ]
        if not entries:
            continue
        results = tmp_path / "results.json"
        results.write_text(json.dumps(rng.permutation(entries).tolist()))
        expected, by_class = pycoco(file, results)
        arguments = [
            "--annotations",
            str(file),
            "--detections",
            str(results),
            "--json",
            str(tmp_path / "s.json"),
        ]
        assert evaluate.main(arguments) == 0
        said = json.loads((tmp_path / "s.json").read_text())
        ours = [said["COCO"][k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        np.testing.assert_allclose([-1 if v is None else v for v in ours], expected, rtol=0, atol=1e-9)
        per_class = [said["classes"][f"class{c}"]["AP_coco"] for c in CATEGORIES]
        np.testing.assert_allclose(
            [np.nan if v is None else v for v in per_class], by_class, rtol=0, atol=1e-9
        )
        assert "| class90 | " in capsys.readouterr().out
    (tmp_path / "order.json").write_text(
        json.dumps([{**e, "category_id": 1 + CATEGORIES.index(e["category_id"])} for e in entries])
    )
    results.write_text(json.dumps(entries))
    found = []
    for path, more in ((results, []), (tmp_path / "order.json", ["--category-ids", "order"])):
        evaluate.main([*arguments, "--detections", str(path), *more])
        found.append(json.loads((tmp_path / "s.json").read_text()))
    assert found[0] == found[1]
    with pytest.raises(UserError, match="none of the classes' \\(3, 7, 90\\)"):
        evaluate.main([*arguments, "--detections", str(tmp_path / "order.json")])


@pytest.mark.parametrize("step", [1, -1, 977_000_000_000_007])
def test_evaluate_is_pycocotools_on_ids_that_no_float_holds(tmp_path, step):
    """2⁵³ and 2⁵³ + 1 are one number as floats; of hashed ids many are. Ids may be in any order and below 0."""
    rng = np.random.default_rng(3)
    while len((case := random_case(rng, most=90))[1].label) < 15:
        pass
    found, truth = case
    truth.label, truth.difficult = np.arange(len(truth.label)) % 3, np.zeros(len(truth.label), bool)
    ids, categories = ([2**53 + step * k for k in range(n)] for n in (5, 3))
    file = coco_json(tmp_path, truth, ids, categories)
    write_results(tmp_path / "r.json", found, ids, categories)
    expected, by_class = pycoco(file, tmp_path / "r.json")
    files = ["--annotations", str(file), "--detections", str(tmp_path / "r.json")]
    assert evaluate.main([*files, "--json", str(tmp_path / "s.json")]) == 0
    said = json.loads((tmp_path / "s.json").read_text())
    ours = [said["COCO"][k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    np.testing.assert_allclose([-1 if v is None else v for v in ours], expected, rtol=0, atol=1e-9)
    in_order = [said["classes"][f"class{c}"]["AP_coco"] for c in sorted(categories)]
    assert in_order == pytest.approx(by_class.tolist()) and len(set(in_order)) == 3


def test_evaluate_presets_and_detectron2(tmp_path, capsys):
    found, truth = random_case(np.random.default_rng(12), most=90)
    file = coco_json(tmp_path, truth, [0, 1, 2, 3, 4], [1, 2, 3])
    write_results(tmp_path / "r.json", found, [0, 1, 2, 3, 4])
    for preset, convention in PRESETS.items():
        arguments = ["--annotations", str(file), "--detections", str(tmp_path / "r.json"), "--preset", preset]
        evaluate.main([*arguments, "--iou", "0.3", "--json", str(tmp_path / "s.json")])
        said = json.loads((tmp_path / "s.json").read_text())
        ap = class_ap(match(found, truth, 5, 3, 0.3, convention))
        for name, key in (("AP_11point", "AP"), ("AP_area", "AP_area")):
            expected = [None if np.isnan(v) else v for v in ap[key][0]]
            assert list(said[name].values()) == pytest.approx(expected)
        assert ("detectron2" in said) == (preset == "detectron2")
    evaluate.main([*arguments, "--preset", "detectron2", "--json", str(tmp_path / "s.json")])
    said = json.loads((tmp_path / "s.json").read_text())["detectron2"]
    means = [
        rescore("detection", match(found, truth, 5, 3, 0.5 + 0.05 * k, PRESETS["detectron2"]))["mAP"][0]
        for k in range(10)
    ]
    assert said == pytest.approx({"AP": np.mean(means), "AP50": means[0], "AP75": means[5]})
    assert "detectron2: AP " in capsys.readouterr().out


def test_nothing_detected(tmp_path):
    _, truth = random_case(np.random.default_rng(13))
    truth.difficult[:] = False
    file = coco_json(tmp_path, truth, [0, 1, 2, 3, 4], [1, 2, 3])
    (tmp_path / "r.json").write_text("[]")
    arguments = ["--annotations", str(file), "--detections", str(tmp_path / "r.json")]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "s.json")]) == 0
    said = json.loads((tmp_path / "s.json").read_text())
    assert said["mAP_11point"] == said["mAP_area"] == said["COCO"]["AP"] == 0


def test_bad_input_is_one_line(tmp_path):
    found, truth = random_case(np.random.default_rng(14))
    file = coco_json(tmp_path, truth, [0, 1, 2, 3, 4], [1, 2, 3])
    write_results(tmp_path / "r.json", found, [0, 1, 2, 3, 4])
    (tmp_path / "comp3_det_test_class1.txt").write_text("0 0.5 1 1 5 5\n")
    good = ["--detections", str(tmp_path / "r.json")]
    for arguments, message in (
        (["--annotations", str(file), *good, "--year", "2007"], "--year, --classes and --rescale are for"),
        (["--annotations", str(tmp_path / "r.json"), *good], "has no list 'images'"),
        (["--annotations", str(tmp_path / "none.json"), *good], "no such file"),
        (["--annotations", str(file), *good, "--iou", "0"], "a share above 0"),
        (["--devkit", str(tmp_path / "none"), *good], "no such folder"),
        (
            ["--annotations", str(file), "--detections", str(tmp_path / "comp3_det_test_class1.txt")],
            "by the folder",
        ),
        (["--annotations", str(file), "--detections", str(tmp_path / "none.json")], "no such file"),
        (["--annotations", str(file), "--detections", str(file)], "is a list of detections"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "detection/evaluate.py"),
            "--annotations",
            str(file),
            "--detections",
            "x.json",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and done.stderr == "error: x.json: no such file\n"
    assert evaluate.main(["--annotations", str(file), "--detections", str(tmp_path)]) == 0
