"""WSOL: maps proved against logits, boxes against plain loops, the scripts from arguments to cell."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backbench.common.backbones.resnet import Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.recipe import override
from backbench.common.data import open_localisation
from backbench.common.engine.loop import make_optimizer, make_schedulers
from backbench.common.metrics import rescore
from backbench.wsol import boxes, cam, evaluate, finetune
from backbench.wsol.recipes import PAPER, PAPER_IMAGENET, RECIPES
from backbench.wsol.report import choose_threshold, statistics


@pytest.mark.parametrize("arch", ["resnet18_half", "resnet50"])
def test_mean_of_the_map_plus_bias_is_the_logit(arch):
    torch.manual_seed(0)
    model = Classifier(Trunk(arch), 7).double().eval()
    model.trunk.unstride("layer4")
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    labels = torch.tensor([4, 0, 6])
    with torch.no_grad():
        features = model.trunk(images)
        assert features.shape[2:] == (4, 6)  # stride 16
        logits, classes, maps = cam.predict(model, features, labels, top=5)
        torch.testing.assert_close(logits, model(images), rtol=1e-12, atol=1e-12)
    assert classes[:, 0].tolist() == labels.tolist()
    assert torch.equal(classes[:, 1:], logits.topk(5).indices)
    expected = maps.mean((2, 3)) + model.fc.bias[classes]
    torch.testing.assert_close(expected, logits.gather(1, classes), rtol=1e-12, atol=1e-12)


def test_maps_equal_a_plain_loop():
    torch.manual_seed(0)
    features, weight = torch.rand(2, 3, 4, 5), torch.randn(6, 3)
    classes = torch.tensor([[5, 1], [0, 0]])
    maps = cam.class_maps(features, weight, classes)
    for n in range(2):
        for k in range(2):
            for y in range(4):
                for x in range(5):
                    value = sum(weight[classes[n, k], c] * features[n, c, y, x] for c in range(3))
                    assert maps[n, k, y, x] == pytest.approx(float(value), abs=1e-6)


def test_layer4_unstrided_gives_14_by_14_with_the_same_weights():
    plain, model = Trunk("resnet50"), Trunk("resnet50")
    model.unstride("layer4")
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert model.strides["layer4"] == 16
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 2048, 14, 14)


def test_compact_maps_survive_storing(tmp_path):
    rng = np.random.default_rng(0)
    maps = (rng.normal(size=(3, 2, 5, 5)) * 1e-3 + 1000).astype(np.float32)  # a small range far from 0
    maps[1, 1] = 7
    stored = cam.compact(np.array(["a", "b", "c"]), np.arange(6).reshape(3, 2), maps)
    stored.save(tmp_path / "maps.npz", rank=np.array([0, 1, 2]))
    loaded, more = cam.load_maps(tmp_path / "maps.npz")
    assert loaded.maps.dtype == np.float16 and loaded.ids.tolist() == ["a", "b", "c"]
    assert more["rank"].tolist() == [0, 1, 2]
    span = (loaded.high - loaded.low)[:, :, None, None]
    error = np.abs(loaded.low[:, :, None, None].astype(float) + span * loaded.maps.astype(float) - maps)
    assert (error <= span * 2.0**-11).all()  # half a step of float16 just below 1
    assert (loaded.maps[1, 1] == 0).all() and loaded.low[1, 1] == loaded.high[1, 1] == 7


def test_a_map_that_is_not_finite_names_the_image():
    maps = np.zeros((2, 1, 2, 2), np.float32)
    maps[1, 0, 1, 1] = np.inf
    with pytest.raises(UserError, match="image second"):
        cam.compact(np.array(["first", "second"]), np.zeros((2, 1), int), maps)


def test_upsampling_equals_torch_and_a_loop():
    maps = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    up = np.stack([boxes.upsample(image, 24) for image in maps])
    expected = F.interpolate(torch.from_numpy(maps)[:, None], (24, 24), mode="bilinear")[:, 0]
    np.testing.assert_allclose(up, expected.numpy(), atol=1e-6)
    y, x = (5 + 0.5) / 8 - 0.5, (20 + 0.5) / 6 - 0.5
    rows = maps[0, 0] * (1 - y) + maps[0, 1] * y
    assert up[0, 5, 20] == pytest.approx(rows[2] * (3 - x) + rows[3] * (x - 2), abs=1e-6)


def region_loop(mask):
    """The box of the largest 8-connected region by flood fill; of equals the topmost, then leftmost."""
    height, width = mask.shape
    seen, found = np.zeros_like(mask), []
    for start in zip(*np.nonzero(mask)):
        if seen[start]:
            continue
        seen[start], stack, region = True, [start], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    if mask[v, u] and not seen[v, u]:
                        seen[v, u] = True
                        stack.append((v, u))
        ys, xs = zip(*region)
        found.append((-len(region), min(ys), min(xs), max(ys), max(xs)))
    if not found:
        return [0, 0, 0, 0]
    _, top, left, bottom, right = min(found)
    return [left, top, right + 1, bottom + 1]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_largest_region_equals_a_flood_fill(share):
    rng = np.random.default_rng(int(share * 10))
    for _ in range(100):
        mask = rng.random((9, 12)) < share
        assert list(boxes.largest_region_box(mask)) == region_loop(mask)


def test_rules_of_the_largest_region():
    mask = np.zeros((8, 8), bool)
    assert boxes.largest_region_box(mask) == (0, 0, 0, 0)
    mask[7, 7] = True
    assert boxes.largest_region_box(mask) == (7, 7, 8, 8)  # half-open
    mask[6, 6] = True
    assert boxes.largest_region_box(mask) == (6, 6, 8, 8)  # 8-connected
    mask[0:1, 0:2] = True
    assert boxes.largest_region_box(mask) == (0, 0, 2, 1)  # of equals the topmost
    mask[5, 5] = True
    assert boxes.largest_region_box(mask) == (5, 5, 8, 8)  # most pixels, whatever its place or box
    assert boxes.largest_region_box(np.ones((8, 8), bool)) == (0, 0, 8, 8)
    ring = np.ones((9, 9), bool)
    ring[1:8, 1:8] = False
    assert boxes.largest_region_box(ring) == (0, 0, 9, 9)
    assert boxes.largest_region_box(~ring) == (1, 1, 8, 8)
    ring[2:7, 2:7] = True
    ring[0, :5] = ring[:5, 0] = False
    assert boxes.largest_region_box(ring) == (2, 2, 7, 7)  # an island of 25 pixels in a ring of 23


def test_boxes_from_maps_equal_the_image_by_image_way():
    rng = np.random.default_rng(1)
    maps = rng.random((20, 5, 5)).astype(np.float16)
    thresholds = np.array([0.15, 0.5, 0.9])
    found = boxes.boxes_from_maps(maps, 40, thresholds)
    assert found.shape == (len(maps), 3, 4)
    for number, image in enumerate(maps):
        up = boxes.upsample(image, 40).astype(np.float64)
        scaled = (up - up.min()) / (up.max() - up.min())
        for column, threshold in enumerate(thresholds):
            assert found[number, column].tolist() == region_loop(scaled > threshold)
    np.testing.assert_array_equal(boxes.boxes_from_maps(maps, 40, 0.5), found[:, 1])


def test_a_constant_map_gives_the_empty_box():
    maps = np.stack([np.full((4, 4), 0.3), np.eye(4)]).astype(np.float32)
    assert boxes.boxes_from_maps(maps, 4, 0.15).tolist() == [[0, 0, 0, 0], [0, 0, 4, 4]]
    assert boxes.boxes_from_maps(maps[:1], 37, 0.15).tolist() == [[0, 0, 0, 0]]  # whatever rounding leaves
    assert boxes.boxes_from_maps(maps[1:], 4, 1.0).tolist() == [
        [0, 0, 0, 0]
    ]  # nothing lies above the maximum


def test_a_box_does_not_depend_on_scale_or_offset_of_the_map():
    maps = np.random.default_rng(2).integers(0, 64, (6, 7, 7)).astype(np.float32)
    first = boxes.boxes_from_maps(maps, 56, 0.3)
    np.testing.assert_array_equal(first, boxes.boxes_from_maps(maps * 4 - 128, 56, 0.3))


def test_true_boxes_in_the_crop():
    shares = np.array([[0.0, 0, 1, 1], [0.25, 0.5, 0.5, 0.75], [0.0, 0, 0.0625, 1], [0.0, 0, 0.07, 1]])
    found = boxes.to_crop(shares, 256, 224)
    np.testing.assert_allclose(found[:2], [[0, 0, 224, 224], [48, 112, 112, 176]])
    np.testing.assert_allclose(found[2:], [[0, 0, 256 * 0.07 - 16, 224]])  # the third lies outside the crop
    assert boxes.to_crop(shares[2:3], 256, 224).shape == (0, 4)
    np.testing.assert_allclose(boxes.to_crop(shares[1], 224, 224), [[56, 112, 112, 168]])  # no crop


def test_a_chosen_threshold_is_the_best_on_the_images_it_is_chosen_on():
    rng = np.random.default_rng(0)
    maps = np.zeros((20, 8, 8), np.float32)
    truths = []
    for image in maps:
        x, y = rng.integers(0, 4, 2)
        image[y : y + 5, x : x + 5] = 0.4  # a wide faint body, a bright spot in it
        image[y + 2, x + 2] = 1
        truths.append(np.array([[x, y, x + 5, y + 5]], float))
    chosen, curve = choose_threshold(maps, truths, 8)
    assert chosen == pytest.approx(0.05)  # of all that are right, the first
    right = dict(zip(np.round(curve["threshold"], 2), curve["GT-known Loc"]))
    assert right[0.05] == right[0.35] == 1 and right[0.45] == 0
    chosen, _ = choose_threshold(maps + 0.3 * (maps == 0) * (np.indices(maps.shape)[1] > 3), truths, 8)
    assert 0.25 < chosen < 0.4  # a bright background rules the low ones out


def test_top1_box_is_of_the_predicted_class():
    maps = np.zeros((2, 2, 8, 8), np.float32)
    maps[:, 0, :4, :4] = 1  # the true class's
    maps[1, 1, 4:, 4:] = 1  # another class, predicted for the second image
    maps[0, 1] = maps[0, 0]
    stored = cam.compact(np.array(["a", "b"]), np.array([[3, 3], [3, 1]]), maps)
    truths = [np.array([[0.0, 0, 4, 4]])] * 2
    images, found = statistics(stored, {"rank": np.array([0, 1])}, truths, 0.5, 8)
    assert images["iou_gt"].tolist() == [1, 1] and images["iou_top1"].tolist() == [1, 0]
    assert found["top1"].tolist() == [[0, 0, 4, 4], [4, 4, 8, 8]]


def test_window_and_boxes_return_from_the_crop():
    np.testing.assert_allclose(boxes.crop_window(256, 224), [0.0625, 0.0625, 0.9375, 0.9375])
    shares = np.array([[0.2, 0.3, 0.6, 0.8]])
    np.testing.assert_allclose(boxes.from_crop(boxes.to_crop(shares, 256, 224), 256, 224), shares)


@pytest.mark.parametrize(
    ("recipe", "drops"), [(PAPER, (150, 300, 450)), (PAPER_IMAGENET, (6, 12, 18))], ids=["cub", "imagenet"]
)
def test_paper_schedules(recipe, drops):
    body, head = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": body.parameters()}, {"params": head.parameters(), "lr": recipe.head_lr}]
    optimizer = make_optimizer(nn.Sequential(body, head), recipe, groups)
    schedulers = make_schedulers(optimizer, recipe, images=recipe.batch)  # an epoch is one iteration
    rates = []
    for _ in range(recipe.length(recipe.batch)):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for epoch, (slow, fast) in enumerate(rates):
        factor = 0.1 ** sum(epoch >= drop for drop in drops)
        assert slow == pytest.approx(recipe.lr * factor) and fast == pytest.approx(10 * recipe.lr * factor)
    assert rates[0][1] == pytest.approx({600: 0.01, 20: 0.1}[len(rates)])


@pytest.mark.parametrize(
    "setting", ["threshold=1", "holdout=1", "holdout=-0.1", "head_lr=0", "top=0", "holdout=0"]
)
def test_recipe_refusals(setting):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        override(RECIPES["tiny"], [setting])


CLASSES = ("Auk", "Bee_eater", "Crow")


def write_cub(root: Path, per_class: int = 16, side: int = 60) -> Path:
    """CUB-200-2011's files: one coloured square an image on noise, its box, a quarter for testing."""
    rng = np.random.default_rng(0)
    tables = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    for label, name in enumerate(CLASSES):
        folder = root / "images" / f"{label + 1:03}.{name}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            image = rng.integers(0, 90, (side, side + 10, 3)).astype(np.uint8)
            x, y = rng.integers(2, side // 2, 2)
            width, height = rng.integers(side // 4, side // 2, 2)
            image[y : y + height, x : x + width, label] = 240
            cv2.imwrite(str(folder / f"{name}_{number}.jpg"), image)
            key = len(tables["images"]) + 1
            tables["images"].append(f"{key} {folder.name}/{name}_{number}.jpg")
            tables["image_class_labels"].append(f"{key} {label + 1}")
            tables["train_test_split"].append(f"{key} {int(number % 4 > 0)}")
            tables["bounding_boxes"].append(f"{key} {x:.1f} {y:.1f} {width:.1f} {height:.1f}")
    tables["classes"] = [f"{label + 1} {label + 1:03}.{name}" for label, name in enumerate(CLASSES)]
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    return write_cub(tmp_path_factory.mktemp("cub") / "birds")


def arguments(cub, out, *more):
    fixed = [
        "--backbone",
        "scratch:resnet18_half",
        "--data",
        f"cub:{cub}",
        "--recipe",
        "smoke",
        "--device",
        "cpu",
    ]
    return [*fixed, "--out", str(out), "--set", "precision=fp32", *more]


def folder_of(out):
    (found,) = Path(out).rglob("recipe.json")
    return found.parent


@pytest.fixture(scope="module")
def finished(cub, tmp_path_factory):
    """A run of the smoke recipe, its threshold chosen on held-out training images."""
    out = tmp_path_factory.mktemp("wsol")
    assert finetune.main(arguments(cub, out)) == 0
    return folder_of(out)


def test_the_cell_can_be_recomputed_from_its_statistics(finished):
    cell = json.loads((finished / "cell.json").read_text())
    with np.load(finished / "images.npz") as file:
        images = dict(file)
    assert cell["primary"] == "Top-1 Loc" and len(images["ids"]) == 12
    assert cell["metrics"] == {k: float(v[0]) for k, v in rescore("wsol", images).items()}
    assert set(cell["metrics"]) == set(cell["chance"])
    assert finished.relative_to(finished.parents[5]).parts[:3] == ("birds", "wsol", "cam")
    assert (finished.parents[3] / "thumbnails.npz").exists()
    assert all(name in cell["files"] for name in ("scoremaps.npz", "scoremaps_held_out.npz", "report.md"))


def test_stored_maps_still_say_the_logits(finished):
    maps, more = cam.load_maps(finished / "scoremaps.npz")
    weights = torch.load(finished / "weights.pt", weights_only=True)["model"]
    assert maps.maps.shape == (12, 4, 4, 4)  # the true and all three predicted classes, stride 16 of 64
    assert (np.sort(maps.classes[:, 1:]) == np.arange(3)).all()
    means = maps.low + (maps.high - maps.low) * maps.maps.astype(np.float32).mean((2, 3))
    error = np.abs(means + weights["fc.bias"].numpy()[maps.classes] - more["logits"])
    assert (error <= (maps.high - maps.low) * 2.0**-11 + 1e-4).all()  # what float16 shares lose
    order = maps.classes[:, 1:].tolist()
    assert more["rank"].tolist() == [row.index(true) for row, true in zip(order, maps.classes[:, 0])]


def test_the_threshold_was_chosen_on_images_neither_trained_on_nor_scored(finished, cub):
    train_set, test_set = open_localisation(f"cub:{cub}")
    kept, held = finetune.hold_out(train_set, RECIPES["smoke"])
    assert len(held) == 9 and len(kept) == 27
    assert not set(kept.ids) & set(held.ids) and not set(held.ids) & set(test_set.ids)
    stored, _ = cam.load_maps(finished / "scoremaps_held_out.npz")
    assert stored.ids.tolist() == held.ids
    report = json.loads((finished / "report.json").read_text())
    truths = [boxes.to_crop(box, 72, 64) for box in held.boxes]
    assert report["threshold"]["value"] == choose_threshold(stored.maps[:, 0], truths, 64)[0]
    assert "9 training images" in report["threshold"]["chosen"]


def test_the_report_reads_alone(finished):
    text, report = (finished / "report.md").read_text(), json.loads((finished / "report.json").read_text())
    assert all(
        word in text for word in ("Top-1 Loc", "chance", "centred box", "held-out", "Threshold", "scratch")
    )
    assert sum(report["IoU histogram"].values()) == 12
    assert report["centred box"]["chosen on"] == "36 training images"
    best = report["best and worst"]["best"]
    assert [entry["IoU"] for entry in best] == sorted((entry["IoU"] for entry in best), reverse=True)


def test_the_same_command_again_computes_nothing(finished, cub, monkeypatch):
    before = (finished / "cell.json").read_bytes()
    out = finished.parents[5]
    monkeypatch.setattr(finetune, "TrainImages", None)  # calling it would raise
    assert finetune.main(arguments(cub, out)) == 0
    assert (finished / "cell.json").read_bytes() == before


def test_killed_and_resumed_is_byte_for_byte_the_same(finished, cub, tmp_path, monkeypatch):
    whole = finetune.make_step

    def dying(*args):
        step, calls = whole(*args), []

        def stepping(*inputs):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return step(*inputs)

        return stepping

    command = arguments(cub, tmp_path, "--set", "save_every=0")
    monkeypatch.setattr(finetune, "make_step", dying)
    with pytest.raises(KeyboardInterrupt):
        finetune.main(command)
    monkeypatch.setattr(finetune, "make_step", whole)
    folder = folder_of(tmp_path)
    assert (folder / "resume.pt").exists() and not (folder / "cell.json").exists()
    maps = cam.ScoreMaps.save
    monkeypatch.setattr(cam.ScoreMaps, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # again, between training and prediction
        finetune.main(command)
    monkeypatch.setattr(cam.ScoreMaps, "save", maps)
    assert finetune.main(command) == 0
    for name in ("images.npz", "scoremaps.npz", "scoremaps_held_out.npz", "report.json"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes(), name


def test_method_head_rate_and_stride_reach_the_training(cub, tmp_path, monkeypatch):
    seen = {}

    def spy(model, step, data, recipe, **named):
        seen.update(model=model, recipe=recipe, **named)
        raise UserError("enough")

    monkeypatch.setattr(finetune, "train", spy)
    with pytest.raises(UserError, match="enough"):
        finetune.main(arguments(cub, tmp_path, "--method", "cutmix"))
    assert seen["recipe"].method == "cutmix" and "method=cutmix" in str(seen["folder"])
    body, head = seen["groups"]
    assert (body["lr"], head["lr"]) == (1.0, RECIPES["smoke"].head_lr)
    assert {id(p) for p in body["params"]} == {id(p) for p in seen["model"].trunk.parameters()}
    assert {id(p) for p in head["params"]} == {id(p) for p in seen["model"].fc.parameters()}
    assert seen["model"].trunk.strides["layer4"] == 16 and all(
        p.requires_grad for p in seen["model"].parameters()
    )


def write_boxes(path: Path, rows: list) -> Path:
    path.write_text("path,x0,y0,x1,y1\n" + "".join(f"{name},{a},{b},{c},{d}\n" for name, a, b, c, d in rows))
    return path


def test_a_folder_with_a_box_list(class_folders, tmp_path):
    rows = [
        (f"val/{name}/{number}.jpg", 0.1, 0.2, 0.9, 0.8)
        for name in ("cat", "dog", "fox")
        for number in range(4)
    ]
    data = f"folder:{class_folders},boxes={write_boxes(tmp_path / 'boxes.csv', rows)}"
    command = [
        "--backbone",
        "scratch:resnet18_half",
        "--data",
        data,
        "--recipe",
        "smoke",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UserError, match=r"--set threshold=0\.15"):  # no training image has a box
        finetune.main(command)
    assert not (tmp_path / "out").exists()
    assert finetune.main([*command, "--set", "threshold=0.15", "--device", "cpu"]) == 0
    report = json.loads((folder_of(tmp_path / "out") / "report.json").read_text())
    assert report["threshold"] == {"value": 0.15, "chosen": "given by the recipe"}
    assert report["centred box"]["chosen on"] == "the scored images themselves"
    assert report["centred box"]["GT-known Loc"] == 1


@pytest.fixture
def scored(tmp_path):
    """Four images' maps and boxes: two right, one off, one with two boxes of which the second fits."""
    truth = {"a/1.jpg": (0, 0, 4), "a/2.jpg": (2, 2, 4), "b/3.png": (4, 4, 4), "b/4.png": (0, 4, 4)}
    rows = []
    for name, (x, y, side) in truth.items():
        image = np.zeros((8, 8))
        image[y : y + side, x : x + side] = 5
        path = tmp_path / "maps" / (name + ".npy" if name < "b" else str(Path(name).with_suffix(".npy")))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image)
        rows.append((name, x / 8, y / 8, (x + side) / 8, (y + side) / 8))
    rows[2] = ("b/3.png", 0, 0, 0.5, 0.5)
    rows.insert(3, ("b/4.png", 0.5, 0, 1, 0.5))
    labels = tmp_path / "labels.csv"
    labels.write_text("path,label,predicted\na/1.jpg,a,a\na/2.jpg,a,b\nb/3.png,b,b\nb/4.png,b,b\n")
    fixed = ["--scoremaps", str(tmp_path / "maps"), "--boxes", str(write_boxes(tmp_path / "boxes.csv", rows))]
    return tmp_path, [*fixed, "--size", "8"], labels


def test_evaluate_anyones_maps(scored, capsys):
    folder, command, labels = scored
    assert evaluate.main(command) == 0
    assert "GT-known Loc: 75.00 %" in capsys.readouterr().out
    assert evaluate.main([*command, "--labels", str(labels), "--json", str(folder / "scores.json")]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["metrics"] == {
        "Top-1 Loc": 0.5,
        "GT-known Loc": 0.75,
        "top-1": 0.75,
        "MaxBoxAcc": 0.75,
        "MaxBoxAccV2": pytest.approx((0.75 + 0.75 + 0.75) / 3),
    }
    assert scores["images"] == 4
    paper = [*command, "--protocol", "paper", "--labels", str(labels), "--json", str(folder / "paper.json")]
    assert evaluate.main(paper) == 0
    alone = json.loads((folder / "paper.json").read_text())["metrics"]
    assert alone == {name: scores["metrics"][name] for name in ("Top-1 Loc", "GT-known Loc", "top-1")}


def test_evaluate_counts_an_image_whose_box_is_bad_as_a_miss(scored, capsys):
    """Two maps that are right: a box without area leaves 50 % of 2, and columns in another order are refused."""
    folder, command, _ = scored
    boxes = folder / "boxes.csv"
    boxes.write_text("path,x0,y0,x1,y1\na/1.jpg,0,0,.5,.5\na/2.jpg,.25,.25,.25,.75\n")
    assert evaluate.main(command) == 0
    out = capsys.readouterr().out
    assert "GT-known Loc: 50.00 %" in out and "2 images" in out
    assert "data: 1 × image of which every box was dropped: a miss where it is scored (first: a/2.jpg)" in out
    boxes.write_text("path,x0,y0,x1,y1\na/1.jpg,0,.5,0,.5\na/2.jpg,.25,.75,.125,.75\n")
    with pytest.raises(UserError, match=r"line 3: x0 0.25 is above x1 0.125: swapped corners, or columns in"):
        evaluate.main(command)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 2, 3)), r"2-D .* found \(2, 2, 3\)"),
        (np.array([[np.nan, 1]]), "not finite"),
        (b"text", "readable"),
    ],
)
def test_evaluate_refuses_bad_maps(scored, content, message):
    folder, command, _ = scored
    path = folder / "maps" / "b" / "3.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(command)
    assert str(path) in str(error.value)


def test_evaluate_names_what_is_absent(scored):
    folder, command, labels = scored
    labels.write_text("path,label,predicted\na/1.jpg,a,a\n")
    with pytest.raises(UserError, match=r"3 of 4 boxed images have no row \(first: a/2.jpg\)"):
        evaluate.main([*command, "--labels", str(labels)])
    (folder / "maps" / "a" / "2.jpg.npy").unlink()
    with pytest.raises(UserError, match=r"1 of 4 maps are absent .*a/2\.jpg\.npy"):
        evaluate.main(command)
    with pytest.raises(UserError, match="belong together"):
        evaluate.main([*command, "--crop", "224"])


def test_evaluate_agrees_with_the_cell_on_its_own_maps(finished, cub, tmp_path):
    maps, _ = cam.load_maps(finished / "scoremaps.npz")
    _, test_set = open_localisation(f"cub:{cub}")
    rows = []
    for name, image, box in zip(maps.ids, maps.maps[:, 0], test_set.boxes):
        path = tmp_path / "maps" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image)
        rows.append((name, *box[0]))
    threshold = json.loads((finished / "report.json").read_text())["threshold"]["value"]
    listed = write_boxes(tmp_path / "boxes.csv", rows)
    command = [
        "--scoremaps",
        str(tmp_path / "maps"),
        "--boxes",
        str(listed),
        "--resize",
        "72",
        "--crop",
        "64",
    ]
    assert evaluate.main([*command, "--threshold", str(threshold), "--json", str(tmp_path / "s.json")]) == 0
    cell = json.loads((finished / "cell.json").read_text())
    scores = json.loads((tmp_path / "s.json").read_text())["metrics"]
    names = ("GT-known Loc", "MaxBoxAcc", "MaxBoxAccV2")
    assert scores == {name: cell["metrics"][name] for name in names}


def test_evaluate_says_of_labels_what_it_cannot_use(scored, capsys):
    """Rows of other images, of an image twice, and names for numbers, which would be 0 % in silence."""
    _, command, labels = scored
    command = [*command, "--labels", str(labels)]
    rows = labels.read_text().rstrip("\n")
    labels.write_text(f"{rows}\nother/9.jpg,a,a\nother/8.jpg,a,a\n")
    assert evaluate.main(command) == 0
    line = "data: 2 × row of labels.csv whose image has no box: not scored (first: other/8.jpg)"
    assert line in capsys.readouterr().out
    header, first, *more = rows.split("\n")
    labels.write_text("\n".join([header, first, first, *more]))
    with pytest.raises(UserError, match=r"labels.csv line 3: '.*' has a row already"):
        evaluate.main(command)
    numbered = [f"{row.partition(',')[0]},dog,3" for row in (first, *more)]
    labels.write_text("\n".join([header, *numbered]))
    assert evaluate.main(command) == 0
    assert "label is no image's predicted class: are both in the same words?" in capsys.readouterr().out
