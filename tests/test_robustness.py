"""pretrain/robustness.py: attacks, occlusion, mixed pairs and other data against plain loops; its cells and errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_class_folders
from test_cifar import write_cifar
from torch.nn import functional as F
from torchvision.models import resnet18

from backbench.common.base.errors import UserError
from backbench.common.board.cells import load_cells
from backbench.common.board.leaderboard import make_board
from backbench.common.data.decode import read_rgb
from backbench.common.metrics import rescore
from backbench.common.report.html import write_report
from backbench.common.report.writing import methods_markdown
from backbench.pretrain import evaluate, robustness, run, stress
from backbench.pretrain.outliers import open_outliers
from backbench.pretrain.recipes import ROBUSTNESS, RobustnessRecipe

CPU = torch.device("cpu")
NEUTRAL = (0.0,) * 3, (1.0,) * 3  # mean and deviation that change nothing
SMALL = RobustnessRecipe(size=8, resize=8, holes=4, lambdas=4, precision="fp32", test_batch=4)


def test_fgsm_on_a_linear_model_is_epsilon_times_the_sign_of_its_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1, bias=False))
    weights = model[1].weight.detach().view(3, 8, 8)
    classify = stress.classifier(model, *NEUTRAL, SMALL, CPU)

    def two(pixels):  # class 0 has the logit w·x, class 1 has 0: the loss of class 1 grows along w
        logit = classify(pixels)
        return torch.cat([logit, torch.zeros_like(logit)], 1)

    pixels = 0.25 + 0.5 * torch.rand(4, 3, 8, 8)
    attacked = stress.fgsm(two, pixels, torch.tensor([1, 1, 0, 0]), 0.125)[0]
    torch.testing.assert_close(attacked[:2], pixels[:2] + 0.125 * weights.sign(), rtol=0, atol=0)
    torch.testing.assert_close(attacked[2:], pixels[2:] - 0.125 * weights.sign(), rtol=0, atol=0)
    ends = torch.cat([torch.zeros_like(pixels[:1]), torch.ones_like(pixels[:1])])
    cut = stress.fgsm(two, ends, torch.tensor([1, 1]), 0.125)[0]
    expected = (ends + 0.125 * weights.sign()).clamp(0, 1)
    torch.testing.assert_close(cut, expected, rtol=0, atol=0)


def test_fgsm_of_torchvisions_resnet_equals_a_plain_loop_over_images():
    torch.manual_seed(0)
    model = resnet18(num_classes=4).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.1, 0.4)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    labels = np.array([0, 1, 2, 3, 0])
    recipe = replace(SMALL, size=32, epsilon=8.0)
    classify = stress.classifier(model, mean, std, recipe, CPU)
    shown = []

    def watched(pixels):
        shown.append(pixels.detach().clone())
        return classify(pixels)

    found = stress.run_fgsm(watched, images, labels, recipe, CPU, "fgsm")
    clean, moved = torch.cat(shown[::2]), torch.cat(shown[1::2])
    assert float((moved - clean).abs().max()) == pytest.approx(8 / 255) and len(shown) == 4  # batches of 4
    attacked = stress.fgsm(classify, stress.to_pixels(images, CPU), torch.from_numpy(labels), 8 / 255)[0]

    for image, label, moved, clean, after in zip(images, labels, attacked, found["clean"], found["attacked"]):
        x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        x.requires_grad_()
        centre, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        logits = model((x - centre) / scale)
        F.cross_entropy(logits, torch.tensor([label])).backward()
        expected = (x + 8 / 255 * x.grad.sign()).clamp(0, 1).detach()
        far = x.grad.abs() > 1e-6  # a batch's sums round differently
        torch.testing.assert_close(moved[None][far], expected[far], rtol=0, atol=1e-7)
        assert far.float().mean() > 0.9
        with torch.inference_mode():
            assert after == model((moved[None] - centre) / scale).argmax()
        assert clean == logits.argmax()
    assert not found["blind"].any()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_image_without_gradient_is_counted():
    classify = stress.classifier(torch.nn.Flatten(), *NEUTRAL, SMALL, CPU)
    images = np.zeros((3, 1, 1, 3), np.uint8)
    images[1, 0, 0, 0] = 255
    found = stress.run_fgsm(
        lambda pixels: 1e6 * classify(pixels), images, np.array([0, 0, 1]), SMALL, CPU, "fgsm"
    )
    assert found["blind"].tolist() == [False, True, False]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(broken):
    images = np.full((3, 8, 8, 3), 255, np.uint8)

    def classify(pixels):
        return pixels.mean((2, 3)) * torch.tensor([1, 1, broken])

    with pytest.raises(UserError, match="not finite for 3 of 3 images"):
        stress.run_fgsm(classify, images, np.zeros(3, np.int64), SMALL, CPU, "fgsm")
    with pytest.raises(UserError, match="not finite for 3 of 3 images"):
        stress.run_occlusion(classify, images, (0.5,) * 3, SMALL, CPU, "occlusion")
    with pytest.raises(UserError, match="not finite for 3 of 3 images"):
        stress.run_confidence(classify, 3, images.__getitem__, SMALL, CPU, "ood")


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("fill", ["mean", "black"])
def test_occlusion_hides_the_centre_or_all_but_it(size, fill):
    """Hole 0: the clean image, and nothing of it; the whole image: the reverse."""
    recipe = replace(SMALL, size=size, resize=size, fill=fill)
    images = np.random.default_rng(0).integers(0, 256, (6, size, size, 3)).astype(np.uint8)
    mean, seen = (0.5, 0.25, 0.75), []

    def classify(pixels):
        seen.append(pixels.clone())
        return pixels.mean((2, 3))

    found = stress.run_occlusion(classify, images, mean, recipe, CPU, "occlusion")
    hidden = np.array(mean if fill == "mean" else (0, 0, 0), np.float32)

    def plain(side, centre):
        expected = images.astype(np.float32) / 255
        start = (size - side) // 2
        hole = np.zeros((size, size), bool)
        hole[start : start + side, start : start + side] = True
        expected[:, hole if centre else ~hole] = hidden
        return expected

    sides = stress.hole_sides(size, 4)
    assert sides[0] == 0 and sides[-1] == size
    for kind in ("centre", "boundary"):
        expected = [plain(side, kind == "centre").mean((1, 2)).argmax(1) for side in sides]
        np.testing.assert_array_equal(found[kind], np.stack(expected, 1))
    np.testing.assert_array_equal(found["centre"][:, 0], found["boundary"][:, -1])
    np.testing.assert_array_equal(found["centre"][:, -1], found["boundary"][:, 0])
    shown = [plain(side, True)[:4] for side in sides] + [plain(side, False)[:4] for side in sides[1:-1]]
    for pixels, expected in zip(seen, shown):  # the first batch, pixel by pixel
        np.testing.assert_allclose(pixels.permute(0, 2, 3, 1).numpy(), expected, atol=1e-7)


def test_mixed_pairs_go_from_the_first_to_the_second_image():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    pairs, seen = stress.draw_pairs(5, 4, seed=0), []

    def classify(pixels):
        seen.append(pixels.permute(0, 2, 3, 1).numpy().copy())
        return pixels.mean((2, 3))

    found = stress.run_between(classify, images, pairs, SMALL, CPU, "between")
    first, second = (images[pairs[:, k]] / np.float32(255) for k in (0, 1))
    mixed = [(1 - share) * first + share * second for share in (0, 0.25, 0.5, 0.75, 1)]
    pasted = [first.copy() for _ in range(3)]
    for k, picture in enumerate(pasted, start=1):
        picture[:, 4 - k : 4 + k, 4 - k : 4 + k] = second[:, 4 - k : 4 + k, 4 - k : 4 + k]
    for picture, expected in zip(seen, mixed + pasted):
        np.testing.assert_allclose(picture, expected, atol=1e-6)
    np.testing.assert_array_equal(found["mixup"][:, [0, -1]], found["cutmix"][:, [0, -1]])
    assert found["mixup"].shape == (4, 5) and found["cutmix"].shape == (4, 5)


@pytest.mark.parametrize("images, pairs", [(2, 7), (10, 10), (10, 35), (100, 30)])
def test_pairs_are_of_different_images_all_as_often(images, pairs):
    found = stress.draw_pairs(images, pairs, seed=3)
    assert found.shape == (pairs, 2) and (found[:, 0] != found[:, 1]).all()
    for side in found.T:
        counts = np.bincount(side, minlength=images)
        assert counts.max() - counts.min() <= 1
    assert (found == stress.draw_pairs(images, pairs, seed=3)).all()
    assert images < 10 or (found != stress.draw_pairs(images, pairs, seed=4)).any()


def test_confidence_is_the_softmax_and_does_not_saturate():
    logits = torch.tensor([[1.0, 2, 3], [50, 0, 0], [60, 0, 0], [0, 0, 0]])
    found = stress.log_confidence(logits)
    torch.testing.assert_close(found.exp(), logits.double().softmax(1).amax(1))
    assert float(logits.softmax(1).amax(1)[1]) == float(logits.softmax(1).amax(1)[2]) == 1
    assert found[1] < found[2] < 0


def test_noise_is_what_it_is_called_and_the_same_in_any_batch():
    for kind, mean, std in (("uniform", 0.5, 12**-0.5), ("gaussian", 0.5, 0.4302)):
        whole = stress.noise(kind, 0, 6, 40, seed=1)
        np.testing.assert_array_equal(stress.noise(kind, 4, 2, 40, seed=1), whole[4:])
        assert whole.min() >= 0 and whole.max() <= 1 and len({image.tobytes() for image in whole}) == 6
        assert whole.mean() == pytest.approx(mean, abs=0.01) and whole.std() == pytest.approx(std, abs=0.01)
    normal = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert float((normal + 0.5).clamp(0, 1).std()) == pytest.approx(0.4302, abs=2e-3)


@pytest.fixture(scope="module")
def trained(class_folders, tmp_path_factory):
    """Two backbone files of one data set."""
    out = tmp_path_factory.mktemp("trained")
    for method in ("baseline", "cutmix"):
        quick = ["--recipe", "smoke", "--set", "iterations=4", "--method", method]
        run.main([*quick, "--data", f"folder:{class_folders}", "--out", str(out / method)])
    return out


def call(trained, class_folders, out, *more, files=("baseline/baseline.pt", "cutmix/cutmix.pt")):
    robustness.main(
        [
            *("--backbone", *(str(trained / file) for file in files), "--data", f"folder:{class_folders}"),
            *("--recipe", "smoke", "--out", str(out), *more),
        ]
    )


@pytest.fixture(scope="module")
def results(trained, class_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    call(
        trained, class_folders, out, "--ood", "uniform", "gaussian", f"cats=folder:{class_folders}/train/cat"
    )
    return out


def test_one_command_gives_a_cell_a_test_and_the_board_shows_them(results, trained, tmp_path):
    cells = load_cells(results)
    assert len(cells) == 8 and {c.identity.task for c in cells} == {"robustness"}
    board = make_board(cells)
    columns = {column.model: column for column in board.columns}
    assert list(columns) == ["fgsm", "occlusion", "between", "ood"]
    assert [row.label for row in board.rows] == ["baseline", "cutmix"]
    assert columns["ood"].recipe == "smoke+ood=cats_gaussian_uniform" and columns["ood"].images == 18 + 38
    assert board.ranks.across is None  # no transfer
    for name, metric in (("fgsm", "top-1 attacked"), ("occlusion", "top-1 occluded"), ("ood", "AUROC")):
        measure = board.primary(board.rows[1], columns[name])
        assert columns[name].metric == metric and measure.score and measure.difference
    assert board.primary(board.rows[1], columns["ood"]).paper.value == 0.944
    clean = {c.identity.backbone: c.metrics["top-1 clean"] for c in cells if c.identity.model == "fgsm"}
    for name in ("baseline", "cutmix"):
        own = json.loads((trained / name / "cell.json").read_text())["metrics"]["top-1"]
        assert clean[name] == own
    write_report(cells, board, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "top-1 error of occluded images, centre hidden" in page and "Mean of each backbone" in page
    assert "were tested as trained: FGSM" in methods_markdown(board)


def test_a_cell_holds_its_statistics_curves_and_pictures(results):
    for cell in load_cells(results):
        again = {k: v[0] for k, v in rescore("robustness", cell.images()).items()}
        assert again == pytest.approx(dict(cell.metrics), abs=1e-12)
        assert set(cell.chance) == set(cell.metrics) and cell.device["device"]
        report = json.loads((cell.folder / "report.json").read_text())
        text = (cell.folder / "report.md").read_text()
        assert "| metric | score | 95 % interval | chance |" in text and "examples.jpg" in text
        assert (cell.folder / "examples.jpg").stat().st_size > 500
        for number, chart in enumerate(report["charts"], start=1):
            assert (cell.folder / f"curves_{number}.svg").read_text().startswith("<svg")
            assert all(len(ys) == len(chart["x"]) for ys in chart["curves"].values())
        if cell.identity.model == "occlusion":
            curves = report["charts"][0]["curves"]
            assert curves["centre hidden"][0] == pytest.approx(1 - cell.metrics["top-1 clean"])
            mean = 1 - np.mean([curves["centre hidden"], curves["boundary hidden"]])
            assert mean == pytest.approx(cell.metrics["top-1 occluded"])
        if cell.identity.model == "ood":
            assert {f"AUROC {name}" for name in ("uniform", "gaussian", "cats")} < set(cell.metrics)


def test_the_same_command_repeats_nothing_and_goes_on_after_a_death(
    results, trained, class_folders, tmp_path, monkeypatch, capsys
):
    shutil.copytree(results, tmp_path / "again")
    more = ("--ood", "uniform", "gaussian", f"cats=folder:{class_folders}/train/cat")
    before = {
        p.relative_to(results): p.read_bytes() for p in results.rglob("*") if p.suffix in (".npz", ".md")
    }
    for path in (tmp_path / "again").rglob("ood/**/cell.json"):  # died while scoring
        path.unlink()
        (path.parent / "images.npz").unlink()
    for path in (tmp_path / "again").rglob("fgsm/**/cell.json"):  # died while predicting
        for name in ("cell.json", "images.npz", "predictions.npz", "stages.json", "examples.jpg"):
            (path.parent / name).unlink()
    with monkeypatch.context() as patch:
        for name in ("run_occlusion", "run_between", "run_confidence"):
            patch.setattr(stress, name, None)
        call(trained, class_folders, tmp_path / "again", *more)
    assert capsys.readouterr().out.count("finished already") == 4
    for path, content in before.items():
        assert (tmp_path / "again" / path).read_bytes() == content, path


def test_a_cell_names_the_command_of_itself_alone(monkeypatch, tmp_path, trained, class_folders):
    script = Path(robustness.__file__)
    arguments = ["--name", "a", "b", "--recipe", "smoke", "--tests", "fgsm", "occlusion", "--limit", "6"]
    files = [str(trained / f"{name}/{name}.pt") for name in ("baseline", "cutmix")]
    arguments += ["--backbone", *files, "--data", f"folder:{class_folders}", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [str(script), *arguments])
    robustness.main(arguments)
    path = next(tmp_path.rglob("robustness/occlusion/*/b/seed0/provenance.json"))
    command = json.loads(path.read_text())["command"]
    assert command[0] == "pretrain.robustness" and command[-2:] == ["--tests", "occlusion"]
    robustness.main([*command[1:], "--out", str(tmp_path / "again")])
    cells = load_cells(tmp_path / "again")
    assert [c.keys for c in cells] == [json.loads((path.parent / "cell.json").read_text())["keys"]]


def test_chosen_tests_settings_and_limits_name_other_cells(trained, class_folders, tmp_path):
    more = ("--tests", "fgsm", "occlusion", "--set", "epsilon=0", "--limit", "9", "--set", "size=24")
    call(trained, class_folders, tmp_path, *more, files=["cutmix/cutmix.pt"])
    cells = {c.identity.model: c for c in load_cells(tmp_path)}
    assert set(cells) == {"fgsm", "occlusion"}
    assert cells["fgsm"].identity.recipe == "smoke+epsilon=0+size=24"  # and occlusion has no ε
    assert cells["occlusion"].identity.recipe == "smoke+size=24" and cells["fgsm"].identity.limit == 9
    assert "epsilon" not in cells["occlusion"].inputs["train"]["recipe"]
    assert cells["fgsm"].metrics["top-1 attacked"] == cells["fgsm"].metrics["top-1 clean"]
    assert cells["fgsm"].eval_precision == "fp32" and cells["fgsm"].inputs["train"]["recipe"]["resize"] == 36


def test_other_data_sets_stand_in_as_out_of_distribution(tmp_path, class_folders):
    write_cifar(tmp_path / "cifar", "cifar10", "python")
    folder = f"{class_folders}/val/dog"
    sets = open_outliers(
        [f"c=cifar10:{tmp_path / 'cifar'},resize", f"dogs=folder:{folder}", f"part={folder},crop"], most=4
    )
    recipe = replace(SMALL, size=16, resize=20)
    for one in sets:
        pixels = one.reader(recipe, seed=0)(slice(0, 4))
        assert pixels.shape == (4, 16, 16, 3) and pixels.dtype == np.uint8
        assert len(one.ids) == one.count == 4 and one.ids[0].startswith(f"{one.name}/")
    whole = read_rgb(sets[2].images.paths[0])  # 40 × 48
    np.testing.assert_array_equal(sets[2].reader(recipe, 0)(slice(0, 1))[0], whole[12:28, 16:32])
    assert len({one.fingerprint for one in sets}) == 3
    for name in ("a=b", "dogs,crop", "c:d é"):  # folders that are called so
        shutil.copytree(folder, tmp_path / name)
        (one,) = open_outliers([f"x=folder:{tmp_path / name}"], most=4)
        assert (one.fit, one.count) == ("", 4)
    assert open_outliers([f"x=folder:{tmp_path}/dogs,crop,crop"], most=4)[0].fit == "crop"
    large = sets[2].reader(replace(SMALL, size=60, resize=60), 0)(slice(0, 2))
    assert large.shape == (2, 60, 60, 3)


BAD = {
    "test field": (["--set", "test=ood"], "--tests says which"),
    "field": (["--set", "speed=1"], "no field 'speed'"),
    "value": (["--set", "holes=0"], "holes=0, at least 1"),
    "epsilon": (["--set", "epsilon=300"], "epsilon=300, it is of 255"),
    "fill": (["--set", "fill=grey"], "choose one of mean, black"),
    "size": (["--set", "size=99"], "nothing could be cropped"),
    "name": (["--name", "a/b", "c"], "give one without /"),
    "names": (["--name", "a"], "1 names for 2 backbones"),
    "equal names": (["--name", "a", "a"], "are both named a; name each"),
    "no user": (["--ood", "x=folder:~nobody-of-this-name"], "there is no such user"),
    "no folder": (["--ood", "x=folder:/nowhere"], "/nowhere: no such folder"),
    "no form": (["--ood", "unifrom"], "--ood unifrom: write uniform, gaussian, NAME=folder:DIR"),
    "built in": (["--ood", "uniform=folder:DIR"], "uniform is the built-in noise"),
    "twice": (["--ood", "uniform", "uniform"], "two sets are named uniform"),
    "one image": (["--limit", "1", "--tests", "between"], "1 test image; pairs need two"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused(trained, class_folders, tmp_path, what):
    arguments, message = BAD[what]
    with pytest.raises(UserError, match=message):
        call(trained, class_folders, tmp_path / "out", *arguments)
    assert not list(tmp_path.rglob("cell.json"))


def test_part_of_the_classes_and_other_weights_of_a_name(trained, class_folders, tmp_path):
    """The network's own index of a class counts, and a name's cell is not taken for another file's."""
    write_class_folders(tmp_path / "two", classes=("dog", "fox"))
    arguments = ("--tests", "fgsm", "--name", "a")
    call(trained, tmp_path / "two", tmp_path / "out", *arguments, files=["cutmix/cutmix.pt"])
    evaluate.main(
        ["--backbone", str(trained / "cutmix/cutmix.pt"), "--data", f"folder:{tmp_path / 'two'}"]
        + ["--out", str(tmp_path / "out")]
    )
    cells = {c.identity.task: c.metrics for c in load_cells(tmp_path / "out")}
    assert cells["robustness"]["top-1 clean"] == cells["classification"]["top-1"]
    labels = np.load(next((tmp_path / "out").rglob("fgsm/**/predictions.npz")))["clean"]
    truth = np.repeat([1, 2], 6)
    assert cells["robustness"]["top-1 clean"] == (labels == truth).mean()
    with pytest.raises(UserError, match="holds a run with backbone="):
        call(trained, tmp_path / "two", tmp_path / "out", *arguments, files=["baseline/baseline.pt"])


def test_wrong_files_and_data_are_refused(trained, class_folders, tmp_path):
    content = torch.load(trained / "cutmix/cutmix.pt", weights_only=True)
    state = {k: v for k, v in content["state_dict"].items() if not k.startswith("fc.")}
    torch.save(state, tmp_path / "body.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    write_class_folders(tmp_path / "two", per_class=2, classes=("cat", "cow"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"body.pth: has no classifier \(fc.weight\)"):
        call(tmp_path, class_folders, out, files=["body.pth"])
    with pytest.raises(UserError, match="does not know class 'cow'"):
        call(trained, tmp_path / "two", out)
    with pytest.raises(UserError, match=r"no image below .*empty .*notes.txt"):
        call(trained, class_folders, out, "--ood", f"x=folder:{tmp_path / 'empty'}")
    assert not out.exists()


def test_evaluations_of_several_checkpoints_share_a_column(trained, class_folders, tmp_path):
    for method in ("baseline", "cutmix"):
        file = str(trained / method / f"{method}.pt")
        evaluate.main(["--backbone", file, "--data", f"folder:{class_folders}", "--out", str(tmp_path)])
    board = make_board(load_cells(tmp_path))
    assert len(board.columns) == 1 and board.primary(board.rows[1], board.columns[0]).difference


def test_named_recipes_are_sound():
    for recipe in ROBUSTNESS.values():
        recipe.check()
    paper = ROBUSTNESS["paper"]
    assert (paper.epsilon, paper.pairs, paper.ood_images) == (8.0, 50_000, 10_000)
    assert stress.hole_sides(224, paper.holes) == list(range(0, 225, 16))
