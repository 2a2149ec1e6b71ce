"""Choe et al.'s protocol against their loop, statistics under weights, pictures and predictions of finished runs."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_wsol import arguments, folder_of, write_boxes, write_cub

from backbench.common.backbones.load import save_backbone
from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.recipe import override
from backbench.common.data import open_localisation
from backbench.common.metrics import rescore
from backbench.common.metrics.localisation import iou, pack_right, shuffled_chance, threshold_curve
from backbench.wsol import cam, choe2020, evaluate, finetune, pictures, predict
from backbench.wsol.model import load_predictor
from backbench.wsol.recipes import RECIPES


def naive_boxes(scaled):
    """wsolevaluation's way: a pass a threshold; the largest contour's box, and every contour's, at 1,000 thresholds."""
    grey = (scaled * 255).astype(np.uint8)
    height, width = grey.shape
    largest, every = [], []
    for threshold in np.arange(0, 1, 0.001):
        mask = cv2.threshold(grey, int(threshold * np.max(grey)), 255, cv2.THRESH_BINARY)[1]
        # without foreground OpenCV 5 takes 15 ms to find nothing
        contours = cv2.findContours(mask, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0] if mask.any() else ()
        boxes = []
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
        areas = [cv2.contourArea(contour) for contour in contours]
        largest.append([boxes[areas.index(max(areas))]] if boxes else [[0, 0, 0, 0]])
        every.append(boxes or [[0, 0, 0, 0]])
    return largest, every


def hard_maps():
    rng = np.random.default_rng(0)
    blob = cv2.GaussianBlur(rng.random((7, 7)).astype(np.float32), (0, 0), 1.5)
    steps = np.repeat(np.repeat(rng.integers(0, 4, (7, 7)), 32, 0), 32, 1).astype(np.float32)
    ring = np.zeros((224, 224), np.float32)
    cv2.circle(ring, (100, 90), 60, 1.0, 9)
    cv2.circle(ring, (180, 180), 20, 0.6, -1)
    return {
        "smooth": blob,
        "many regions and holes": rng.random((14, 14)).astype(np.float32),
        "few values, many ties": steps,
        "ring and disc": ring,
        "single pixels": (rng.random((224, 224)) < 0.002).astype(np.float32),
        "constant": np.full((5, 5), 3, np.float32),
        "saddle": np.outer(np.linspace(-1, 1, 14), np.linspace(-1, 1, 14)).astype(np.float32),
    }


@pytest.mark.parametrize("name", list(hard_maps()))
def test_sweep_equals_a_pass_a_threshold(name):
    scaled = choe2020.scaled_map(hard_maps()[name])
    truths = np.array([[30, 20, 150, 160], [100, 90, 223, 223], [0, 0, 3, 3]])
    best = choe2020.best_by_grey(choe2020.sweep(scaled), truths)[:, choe2020.GREY_OF_THRESHOLD]
    for row, boxes in zip(best, naive_boxes(scaled)):
        expected = [iou(np.array(found)[:, None], truths[None], plus_one=True).max() for found in boxes]
        np.testing.assert_array_equal(row, expected)


def test_sweep_traces_only_where_the_topology_changes(monkeypatch):
    calls, trace = [], cv2.findContours
    monkeypatch.setattr(cv2, "findContours", lambda *a, **k: calls.append(1) or trace(*a, **k))
    y, x = np.mgrid[:224, :224].astype(np.float32)
    scaled = choe2020.scaled_map(-np.hypot(x - 90, y - 130.5))
    found = choe2020.sweep(scaled)
    assert (
        len(found.level) == 255 and len(calls) <= 2
    )  # one hill: at most where it leaves the frame, and its top


def test_a_pixel_splits_where_the_count_of_regions_or_holes_changes():
    for code in range(256):
        stay = np.zeros((3, 3), np.uint8)
        for bit, (dy, dx) in enumerate(choe2020.AROUND):
            stay[1 + dy, 1 + dx] = code >> bit & 1
        counts = []
        for centre in (1, 0):
            stay[1, 1] = centre
            framed = np.pad(stay, 1)
            regions = cv2.connectedComponents(framed, connectivity=8)[0] - 1
            holes = cv2.connectedComponents(1 - framed, connectivity=4)[0] - 2
            counts.append((regions, holes))
        assert (counts[0] != counts[1]) == bool(choe2020._SPLITS[code])


def test_truths_are_cut_down_to_whole_pixels():
    shares = np.array([[60, 27, 385, 331]]) / (500, 335, 500, 335)
    expected = [int(60 * 224 / 500), int(27 * 224 / 335), int(385 * 224 / 500), int(331 * 224 / 335)]
    assert choe2020.pixel_truths(shares * 224, 224).tolist() == [expected]
    for width in (
        3,
        7,
        96,
        375,
        500,
    ):  # where x · 224 / width is whole, a share's rounding must not lose a pixel
        x = np.arange(width + 1)
        assert choe2020.pixel_truths(np.tile(x[:, None] / width * 112, 4), 112)[:, 0].tolist() == [
            int(v * 224.0 / width) for v in x
        ]


def test_an_image_without_a_true_box_or_foreground():
    constant = choe2020.sweep(choe2020.scaled_map(np.zeros((4, 4))))
    assert not len(constant.level)
    assert (choe2020.best_by_grey(constant, np.zeros((0, 4))) == 0).all()
    assert (
        choe2020.best_by_grey(constant, np.array([[0, 0, 1, 0]])) == 0.5
    ).all()  # box 0, 0, 0, 0 is one pixel


def test_box_accuracies_under_weights_equal_a_loop():
    rng = np.random.default_rng(1)
    n = 12
    best = rng.random((n, 2, 255)).cumsum(2) % 1
    packed = choe2020.right_by_grey(best)
    assert packed.shape == (n, 4, 32) and packed.dtype == np.uint8
    zeros = np.zeros(n)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=3)
    scores = rescore(
        "wsol", {"rank": zeros, "iou_gt": zeros, "iou_top1": zeros, "right_by_grey": packed}, weights
    )
    for row, weight in enumerate(weights):

        def accuracy(contour, wanted, weight=weight):
            return max(sum(weight * (best[:, contour, t] >= wanted)) for t in range(255)) / n

        assert scores["MaxBoxAcc"][row] == pytest.approx(accuracy(0, 0.5), abs=1e-12)
        three = np.mean([accuracy(1, wanted) for wanted in (0.3, 0.5, 0.7)])
        assert scores["MaxBoxAccV2"][row] == pytest.approx(three, abs=1e-12)
    assert np.isnan(threshold_curve(packed[:, 0], np.zeros((1, n)))).all()


def test_top5_loc_and_its_chance():
    images = {
        "rank": np.array([0, 4, 4, 5, 0]),
        "iou_gt": np.array([0.6, 0.6, 0.4, 0.9, 0.5]),
        "iou_top1": np.array([0.6, 0.1, 0.9, 0.9, 0.5]),
    }
    assert "Top-5 Loc" not in rescore("wsol", {**images, "num_classes": np.array(5)})
    scores = rescore("wsol", {**images, "num_classes": np.array(6)})
    found = {name: float(value[0]) for name, value in scores.items()}
    assert found == {"Top-1 Loc": 0.2, "GT-known Loc": 0.6, "top-1": 0.4, "Top-5 Loc": 0.4, "top-5": 0.8}
    rng = np.random.default_rng(0)
    labels, box = rng.integers(0, 10, 500), np.array([[0.0, 0, 8, 8]])
    predicted = np.array([rng.permutation(10)[:5] for _ in labels])
    boxes = np.repeat(box, 500, 0)
    chance = shuffled_chance(labels, [box] * 500, predicted, boxes, boxes, rng, num_classes=10)
    assert chance["top-1"] == pytest.approx(0.1, abs=0.02)
    assert chance["top-5"] == chance["Top-5 Loc"] == pytest.approx(0.5, abs=0.03)


def test_pxap_equals_their_histograms():
    rng = np.random.default_rng(2)
    edges = np.append(choe2020.THRESHOLDS, [1.0, 2.0, 3.0])
    counts, inside, outside = 0, np.zeros(1002), np.zeros(1002)
    for _ in range(3):
        scaled = choe2020.scaled_map(rng.random((6, 6)))
        mask = rng.integers(0, 3, scaled.shape)
        counts = counts + choe2020.pixel_counts(scaled, mask)
        inside += np.histogram(scaled[mask == 1], edges)[0]
        outside += np.histogram(scaled[mask == 0], edges)[0]
    np.testing.assert_array_equal(counts, [inside, outside])
    right, wrong = inside[::-1].cumsum(), outside[::-1].cumsum()
    with np.errstate(invalid="ignore"):
        precision, recall = right / (right + wrong), right / inside.sum()
    used = (right + wrong != 0)[1:]
    expected = (precision[1:] * np.diff(recall))[used].sum()
    assert choe2020.pixel_average_precision(counts) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(choe2020.pixel_average_precision(np.array([[0, 0], [1, 2]])))


@pytest.fixture
def masked(tmp_path):
    """Two maps that are 1 on their object, masks of it with an ignored stripe."""
    for number, name in enumerate(("a/1.jpg", "a/2.jpg")):
        image = np.zeros((224, 224), np.float32)
        image[50:150, 20 : 120 + 50 * number] = 1
        mask = np.where(image > 0, 255, 0).astype(np.uint8)
        image[:, :10], mask[:, :10] = 1, 77  # wrong, but ignored
        for folder, suffix in (("maps", ".npy"), ("masks", ".png")):
            (tmp_path / folder / "a").mkdir(parents=True, exist_ok=True)
            path = (tmp_path / folder / name).with_suffix(suffix)
            np.save(path, image) if suffix == ".npy" else cv2.imwrite(str(path), mask)
    return tmp_path


def test_evaluate_masks(masked, capsys):
    command = ["--scoremaps", str(masked / "maps"), "--masks", str(masked / "masks")]
    assert evaluate.main([*command, "--json", str(masked / "s.json")]) == 0
    assert json.loads((masked / "s.json").read_text())["metrics"] == {"PxAP": 1.0}
    rows = [(f"a/{k + 1}.jpg", 20 / 224, 50 / 224, (120 + 50 * k) / 224, 150 / 224) for k in range(2)]
    listed = write_boxes(masked / "boxes.csv", rows)
    assert evaluate.main([*command, "--boxes", str(listed), "--json", str(masked / "s.json")]) == 0
    found = json.loads((masked / "s.json").read_text())
    assert set(found["metrics"]) == {"GT-known Loc", "MaxBoxAcc", "MaxBoxAccV2", "PxAP"}
    assert set(found["choe2020"]["curves"]) == {
        "largest, IoU .5",
        "any, IoU 0.3",
        "any, IoU 0.5",
        "any, IoU 0.7",
    }
    for extra, match in (
        (["--protocol", "paper"], "--masks is for PxAP"),
        (["--resize", "256", "--crop", "224"], "masks are of whole images"),
        (["--labels", "x.csv"], "needs --boxes"),
    ):
        with pytest.raises(UserError, match=match):
            evaluate.main([*command, *extra])
    (masked / "masks" / "a" / "2.png").unlink()
    with pytest.raises(UserError, match="1 of 2 masks are absent"):
        evaluate.main([*command, "--boxes", str(listed)])
    with pytest.raises(UserError, match="nothing to score against"):
        evaluate.main(command[:2])


def test_evaluate_five_predictions(masked):
    rows = [(f"a/{k + 1}.jpg", 20 / 224, 50 / 224, (120 + 50 * k) / 224, 150 / 224) for k in range(2)]
    listed, labels = write_boxes(masked / "boxes.csv", rows), masked / "labels.csv"
    labels.write_text("path,label,predicted\na/1.jpg,f,a;b;c;d;f\na/2.jpg,f,a;b;c;d;e\n")
    command = ["--scoremaps", str(masked / "maps"), "--boxes", str(listed), "--labels", str(labels)]
    command += ["--protocol", "paper", "--json", str(masked / "s.json")]
    assert evaluate.main(command) == 0
    found = json.loads((masked / "s.json").read_text())["metrics"]
    assert found == {"Top-1 Loc": 0, "GT-known Loc": 1, "top-1": 0, "Top-5 Loc": 0.5, "top-5": 0.5}
    labels.write_text("path,label,predicted\na/1.jpg,f,a;b;c;d;f\na/2.jpg,f,a\n")
    with pytest.raises(UserError, match="from 1 to 5 classes"):
        evaluate.main(command)


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    return write_cub(tmp_path_factory.mktemp("cub") / "birds", per_class=8)


@pytest.fixture(scope="module")
def runs(cub, tmp_path_factory):
    """Two finished runs of few iterations."""
    folders = []
    for seed in ("0", "1"):
        out = tmp_path_factory.mktemp("wsol")
        extra = ["--seed", seed, "--set", "iterations=2", "--set", "threshold=0.3"]
        assert finetune.main(arguments(cub, out, *extra)) == 0
        folders.append(folder_of(out))
    return folders


def test_the_report_shows_both_protocols(runs):
    cell = json.loads((runs[0] / "cell.json").read_text())
    report, text = json.loads((runs[0] / "report.json").read_text()), (runs[0] / "report.md").read_text()
    assert {"MaxBoxAcc", "MaxBoxAccV2", "Top-1 Loc", "GT-known Loc", "top-1"} == set(cell["metrics"])
    for name in ("threshold_curve.svg", *report["pictures"]):
        assert (runs[0] / name).exists() and name in cell["files"] and f"({name})" in text
    ElementTree.parse(runs[0] / "threshold_curve.svg")
    centred = cell["baselines"]["best centred box"]
    assert set(centred) == set(cell["metrics"]) - {"top-1"}
    assert all(report["centred box"][name] == value for name, value in centred.items())
    curve = report["choe2020"]["curves"]["largest, IoU .5"]
    assert max(curve) == pytest.approx(cell["metrics"]["MaxBoxAcc"], abs=1e-6)
    assert "choe2020" in text and "| paper | Top-1 Loc |" in text


def test_a_finished_run_is_a_network_again(runs, cub):
    predictor = load_predictor(runs[0], torch.device("cpu"))
    stored, more = cam.load_maps(runs[0] / "scoremaps.npz")
    _, test_set = open_localisation(f"cub:{cub}")
    batch = predictor.normalised(np.stack([predictor.read(test_set.read(i)) for i in range(len(test_set))]))
    chances, maps = predictor.maps(batch)
    means = maps.mean((2, 3)) + predictor.model.fc.bias.detach().numpy()
    rows = np.arange(len(test_set))[:, None]
    np.testing.assert_allclose(means[rows, stored.classes], more["logits"], rtol=1e-3, atol=1e-2)
    assert chances.shape == (len(test_set), 3) and predictor.classes == test_set.classes
    back = predictor.pixels(batch[:1])
    np.testing.assert_array_equal(back[0], predictor.read(test_set.read(0)))


def test_predict_draws_figure_4(runs, cub, tmp_path, capsys):
    _, test_set = open_localisation(f"cub:{cub}")
    rows = [(name, *box[0]) for name, box in zip(test_set.ids, test_set.boxes)]
    images = [str(path) for path in test_set.paths[:2]]
    boxes = write_boxes(tmp_path / "boxes.csv", rows)
    out = tmp_path / "out"
    assert predict.main(["--run", *map(str, runs), *images, "--boxes", str(boxes), "--out", str(out)]) == 0
    entries = json.loads((out / "localisation.json").read_text())
    assert [len(entry["runs"]) for entry in entries] == [2, 2]
    with np.load(runs[0] / "images.npz") as file:  # as the cell scored it, up to float16 of the stored maps
        scored = dict(file)
    for number, entry in enumerate(entries):
        found = entry["runs"][0]
        assert found["backbone"] == "scratch-seed0" and found["drawn"] == found["predicted"]
        assert found["IoU"] == pytest.approx(scored["iou_top1"][number], abs=0.05)
        with Image.open(out / f"{Path(entry['image']).stem}.png") as picture:
            assert picture.width > 3 * 112
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(images[0], folder)
    (folder / "notes.txt").touch()
    assert predict.main(["--run", *map(str, runs), str(folder), "--out", str(tmp_path / "more")]) == 0
    of_folder = json.loads((tmp_path / "more" / "localisation.json").read_text())
    assert [Path(entry["image"]).parent for entry in of_folder] == [folder] and len(of_folder[0]["runs"]) == 2
    drawn = [str(runs[0]), images[0], "--label", "nothing", "--out", str(out)]
    with pytest.raises(UserError, match="class 'nothing' is unknown to this run; it knows Auk"):
        predict.main(["--run", *drawn])


def test_predict_draws_figure_1(runs, cub, tmp_path):
    _, test_set = open_localisation(f"cub:{cub}")
    pair = [str(test_set.paths[0]), str(test_set.paths[-1])]
    fixed = ["--run", str(runs[0]), "--out", str(tmp_path), "--mix", *pair]
    assert predict.main([*fixed, "--classes", "Auk", "Crow"]) == 0
    with Image.open(tmp_path / "mixed-scratch.png") as picture:
        assert picture.width > 3 * 200 and picture.height > 4 * 200


def test_predict_refusals(runs, tmp_path):
    for command, match in (
        (["--run", str(tmp_path / "no"), "x.jpg"], "no such folder"),
        (["--run", str(runs[0])], "name images to localise in, or two with --mix"),
        (["--run", str(tmp_path), "x.jpg"], "no finished run"),
        (["--run", str(runs[0]), "x.jpg"], "x.jpg: no such file"),
        (["--run", str(runs[0]), "--mix", "a.jpg", "b.jpg", "--lam", "1"], "λ is above 0"),
    ):
        with pytest.raises(UserError, match=match):
            predict.main(command)


def test_pictures_show_what_they_are_given(tmp_path):
    image = np.full((40, 60, 3), 100, np.uint8)
    heat = pictures.overlay(image, np.array([[1.0, 0.0]]), np.array([0.25, 0.0, 0.75, 1.0]))
    assert (heat[:, :15] == 100).all() and (heat[:, 45:] == 100).all() and (image == 100).all()
    assert heat[20, 16, 0] > heat[20, 16, 2] and heat[20, 43, 2] > heat[20, 43, 0]  # hot is red, cold is blue
    boxed = pictures.draw_boxes(image, np.array([[0.25, 0.25, 0.75, 0.75], [0, 0, 0, 0]]), pictures.RED)
    assert tuple(boxed[10, 15]) == tuple(boxed[29, 44]) == pictures.RED and tuple(boxed[0, 0]) == (100,) * 3
    with pytest.raises(UserError, match=r"are written as \.png or \.jpg"):
        pictures.save_picture(tmp_path / "x.gif", image)


def test_test_images_from_files_equal_the_cache(cub):
    _, test_set = open_localisation(f"cub:{cub}")
    recipe = override(RECIPES["smoke"], ["test_batch=4"])
    batches = {
        cache: [(now, np.array(squares)) for now, squares in finetune.square_batches(test_set, changed)]
        for cache in ("square", "file")
        for changed in [override(recipe, [f"cache={cache}"])]
    }
    assert len(batches["file"]) == len(batches["square"]) == -(-len(test_set) // 4)
    for (now, first), (again, second) in zip(batches["square"], batches["file"]):
        assert now == again
        np.testing.assert_array_equal(first, second)


def test_statistics_stay_small():
    rng = np.random.default_rng(0)
    edges = np.sort(rng.integers(0, 255, (5000, 4, 2)), -1)
    grey = np.arange(255)
    packed = pack_right((grey >= edges[..., :1]) & (grey < edges[..., 1:]))
    assert packed.nbytes == 5000 * 128  # 640 kB before compression


def test_own_method_is_the_backbones(cub, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Classifier(Trunk("resnet18_half"), 3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.num_batches_tracked += 1
    facts = {"arch": "resnet18_half", "num_classes": 3, "method": "cutmix", "seed": 0}
    save_backbone(tmp_path / "one.pt", model, **facts)
    seen = {}

    def spy(*_, recipe, settings, **__):
        seen.update(recipe=recipe, settings=settings)
        raise UserError("enough")

    monkeypatch.setattr(finetune, "open_transfer", spy)
    for backbone, method in ((str(tmp_path / "one.pt"), "cutmix"), ("scratch:resnet18_half", "baseline")):
        command = ["--backbone", backbone, "--data", f"cub:{cub}", "--recipe", "smoke", "--method", "own"]
        with pytest.raises(UserError, match="enough"):
            finetune.main(command)
        assert seen["recipe"].method == method and seen["settings"] == [
            "method=own"
        ]  # one label for all backbones
