"""pretrain/run.py as its users call it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_class_folders
from PIL import Image
from test_cifar import write_cifar
from torchvision.models import resnet18
from torchvision.transforms import RandomResizedCrop, v2

from backbench.common.backbones.load import IMAGENET_MEAN, IMAGENET_STD, load_backbone, load_classifier
from backbench.common.base.errors import UserError, run_main
from backbench.common.classify.crops import random_resized_crop
from backbench.common.classify.mixing import METHODS as KNOWN
from backbench.common.data.types import ImageSet
from backbench.pretrain import evaluate, report
from backbench.pretrain.class_order import match_classes
from backbench.pretrain.run import main

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--recipe", "smoke", "--set", "iterations=4"]


METHODS = [*KNOWN, "cutout+mixup", "cutout+manifold_mixup", "cutout+label_smoothing"]
METHODS += ["dropblock+label_smoothing", "cutmix+shakedrop"]


@pytest.mark.parametrize("method", METHODS)
def test_writes_a_backbone_file_and_a_cell(class_folders, tmp_path, method):
    assert (
        main([*QUICK, "--method", method, "--data", f"folder:{class_folders}", "--out", str(tmp_path)]) == 0
    )
    backbone = load_backbone(str(tmp_path / f"{method}.pt"))
    assert (backbone.method, backbone.arch) == (method, "resnet18_half")
    cell = json.loads((tmp_path / "cell.json").read_text())
    assert cell["identity"]["task"] == "classification" and 0 <= cell["metrics"]["top-1"] <= 1
    facts = load_classifier(tmp_path / f"{method}.pt")[1]
    assert facts["metrics"] == cell["metrics"] and facts["run_id"] == cell["keys"]["train"]
    assert facts["recipe"]["method"] == method and len(facts["classes"]) == 3
    with np.load(tmp_path / "images.npz") as images:
        assert cell["metrics"]["top-1"] == (images["rank"] == 0).mean()
    assert "| top-1 |" in (tmp_path / "report.md").read_text()


def test_same_seed_gives_the_same_bytes_and_a_second_call_nothing_new(class_folders, tmp_path, capsys):
    for name in ("a", "b"):
        main([*QUICK, "--data", f"folder:{class_folders}", "--out", str(tmp_path / name)])
    assert (tmp_path / "a/baseline.pt").read_bytes() == (tmp_path / "b/baseline.pt").read_bytes()
    before = (tmp_path / "a/cell.json").stat().st_mtime_ns
    command = [sys.executable, str(ROOT / "pretrain/run.py"), *QUICK, "--data", f"folder:{class_folders}"]
    again = subprocess.run(
        [*command, "--out", str(tmp_path / "a")], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 0 and "finished already" in again.stdout
    assert (tmp_path / "a/cell.json").stat().st_mtime_ns == before


BAD = {
    "alpha": (["--set", "alpha=0", "--method", "cutmix"], "alpha=0.0, it must be above 0"),
    "mask": (["--set", "cutout_share=1.5"], "no larger than the image"),
    "pairs": (["--set", "batch=1", "--method", "mixup"], "mixes pairs"),
    "one image": (["--set", "batch=1"], "a micro-batch of 1 image of 32 pixels"),
    "method": (["--method", "cutmics"], "no method 'cutmics'; use one of baseline, cutout"),
    "two pairs": (["--method", "cutmix+mixup"], "both mix pairs"),
    "validation": (["--set", "eval_every=1"], "--set val_share"),
    "one side": (["--set", "val_share=0.01"], "leaves none on one side"),
    "std": (["--set", "std=0,0,0"], "three numbers"),
    "network of CIFAR": (["--arch", "resnet110", "--method", "cutmix", "--set", "alpha=-1"], "alpha=-1"),
    "field": (["--set", "speed=3"], "no field 'speed'"),
    "device": (["--device", "cuda:7"], "not on this machine"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_arguments_are_refused_before_anything_is_written(class_folders, tmp_path, what):
    arguments, message = BAD[what]
    with pytest.raises(UserError, match=message):
        main([*QUICK, *arguments, "--data", f"folder:{class_folders}", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "pretrain.run", *QUICK, "--data", f"folder:{tmp_path}/absent"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and "absent" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_image_that_vanishes_under_a_loader_process_is_one_line(
    class_folders, tmp_path, capsys, monkeypatch
):
    def vanished(self, index):
        raise UserError(f"{self.paths[index]}: gone; put it back")

    monkeypatch.setattr(ImageSet, "read", vanished)  # in the process that is forked off too
    command = [*QUICK, "--set", "crop=random_resized", "--workers", "1", "--data", f"folder:{class_folders}"]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main([*command, "--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"error: {class_folders}/train/"), error
    assert error.endswith("gone; put it back\n") and error.count("\n") == 1


def test_best_weights_are_kept_beside_the_last(class_folders, tmp_path):
    data = ["--data", f"folder:{class_folders}", "--out", str(tmp_path)]
    main([*QUICK, *data, "--set", "val_share=0.25", "--set", "eval_every=0.5", "--set", "lr=0.01"])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    curve = {line["iteration"]: line["eval"]["top-1"] for line in log if "eval" in line}
    best = max(curve, key=lambda i: (curve[i], -i))
    kept = load_classifier(tmp_path / "baseline_best.pt")[1]
    assert kept["epoch"] == pytest.approx(best * 8 / 18, abs=1e-4) and len(curve) >= 3
    last = load_classifier(tmp_path / "baseline.pt")[1]
    assert last["metrics"] == json.loads((tmp_path / "cell.json").read_text())["metrics"]
    line = next(line for line in (tmp_path / "report.md").read_text().splitlines() if "Best of" in line)
    assert f": {best} (there top-1 {100 * curve[best]:.2f}" in line
    assert f"here {100 * kept['metrics']['top-1']:.2f}" in line


def test_shakedrop_is_folded_into_the_weights(class_folders, tmp_path):
    data = ["--data", f"folder:{class_folders}"]
    main([*QUICK, "--method", "shakedrop", *data, "--out", str(tmp_path / "run")])
    plain = load_classifier(tmp_path / "run/shakedrop.pt")[0].state_dict()
    trained = torch.load(tmp_path / "run/weights.pt", weights_only=True)["model"]
    ratio = plain["trunk.layer4.1.bn2.weight"] / trained["trunk.layer4.1.bn2.weight"]
    assert ratio == pytest.approx(0.5)  # p_L = .5 and α of mean 0
    assert torch.equal(plain["trunk.layer4.1.bn1.weight"], trained["trunk.layer4.1.bn1.weight"])


def test_a_cifar_network_trains_on_cifar_and_is_evaluated(tmp_path):
    write_cifar(tmp_path, "cifar10", "python")
    data, out = ["--data", f"cifar10:{tmp_path}"], tmp_path / "run"
    quick = ["--set", "epochs=0", "--set", "iterations=1", "--set", "milestones=", "--set", "batch=4"]
    main(
        ["--recipe", "paper_cifar_resnet110", *quick, "--set", "micro_batch=2", "--method", "cutmix", *data]
        + ["--out", str(out)]
    )
    assert (out / "cutmix.pt").exists()
    cell = json.loads((out / "cell.json").read_text())
    assert cell["identity"]["arch"] == "resnet110" and cell["identity"]["data"] == "cifar10"
    evaluate.main(["--backbone", str(out / "cutmix.pt"), *data, "--out", str(tmp_path / "results")])
    again = json.loads(next((tmp_path / "results").rglob("cell.json")).read_text())
    assert again["metrics"] == cell["metrics"]
    with pytest.raises(UserError, match=r"CIFAR network.*pretrain/evaluate.py"):
        load_backbone(str(out / "cutmix.pt"))


def test_evaluate_repeats_the_cell_of_a_run(class_folders, tmp_path, capsys):
    data = ["--data", f"folder:{class_folders}"]
    main([*QUICK, "--method", "cutmix", "--seed", "3", *data, "--out", str(tmp_path / "run")])
    command = ["--backbone", str(tmp_path / "run/cutmix.pt"), *data, "--out", str(tmp_path / "results")]
    evaluate.main(command)
    folder = tmp_path / f"results/{class_folders.name}/classification/resnet18_half/evaluate/cutmix/seed3"
    ours, theirs = (json.loads((f / "cell.json").read_text()) for f in (tmp_path / "run", folder))
    assert ours["metrics"] == theirs["metrics"]
    assert "| cat |" in (folder / "report.md").read_text()
    capsys.readouterr()
    evaluate.main(command)
    assert "finished already" in capsys.readouterr().out


def test_evaluate_takes_any_checkpoint_and_checks_its_classes(class_folders, tmp_path, capsys):
    torch.manual_seed(0)
    model = resnet18(num_classes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    torch.save(model.state_dict(), tmp_path / "three.pth")
    small = ["--set", "size=32", "--set", "resize=36", "--out", str(tmp_path / "results")]
    evaluate.main(["--backbone", str(tmp_path / "three.pth"), "--data", f"folder:{class_folders}", *small])
    cell = json.loads(next((tmp_path / "results").rglob("cell.json")).read_text())
    with np.load(next((tmp_path / "results").rglob("predictions.npz"))) as predictions:
        ids, logits = predictions["ids"], predictions["logits"]
    transform = v2.Compose(
        [v2.Resize(36), v2.CenterCrop(32), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    images = torch.stack([transform(Image.open(class_folders / name)) for name in ids])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = model.eval()((images - mean) / std).numpy()
    assert logits == pytest.approx(expected, abs=1e-4)
    labels = [["cat", "dog", "fox"].index(name.split("/")[1]) for name in ids]
    assert cell["metrics"]["top-1"] == (expected.argmax(1) == labels).mean()

    body = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    torch.save({**resnet18(num_classes=7).state_dict(), **body}, tmp_path / "seven.pth")
    torch.save(resnet18(num_classes=7).state_dict(), tmp_path / "untrained.pth")
    cifar = {**resnet18(num_classes=3).state_dict(), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    torch.save(cifar, tmp_path / "cifar.pth")
    for file, message in {
        "cifar.pth": r"a CIFAR network \(.*takes those of pretrain/run.py",
        "seven.pth": "classifies 7 classes, the data has 3",
        "untrained.pth": "never trained",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluate.main(["--backbone", str(tmp_path / file), "--data", f"folder:{class_folders}", *small])


def test_a_network_of_1000_classes_is_scored_on_part_of_imagenet(tmp_path):
    names = ("n01440764", "n02102040", "n03888257")  # tench, English springer, parachute: 0, 217, 701
    write_class_folders(tmp_path / "part", per_class=2, classes=names)
    order = match_classes({"num_classes": 1000}, names, "any")
    assert order.index.tolist() == [0, 217, 701] and not order.notes
    with pytest.raises(UserError, match="does not know class 'n00000000'"):
        match_classes({"num_classes": 1000}, ("n00000000",), "any")
    with pytest.raises(UserError, match="classifies 1000 classes, the data has 2"):
        match_classes({"num_classes": 1000}, ("cat", "dog"), "any")


def test_numbers_of_the_report():
    logits = np.log(np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]))
    labels = np.array([0, 1, 1, 0])
    found = report.evaluate(logits, labels, list("abcd"), ["cat", "dog"])
    assert found["metrics"] == {"top-1": 0.75} and found["confusions"] == [("dog", "cat", 1)]
    assert found["by class"] == {"cat": 1.0, "dog": 0.5}
    assert found["calibration error"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)
    broken = np.array([[0.0, 1], [np.nan, 0], [np.inf, 0]])
    with pytest.raises(UserError, match=r"image b: its logits are not finite \(2 of 3 images\)"):
        report.evaluate(broken, np.array([0, 1, 1]), ["a", "b", "c"], ["x", "y"])
    low, high = report.wilson(0.75, 100)
    assert (low, high) == pytest.approx((0.6570, 0.8245), abs=1e-4)  # R's binom.wilson(75, 100)


def test_another_recipe_in_the_folder_is_refused(class_folders, tmp_path):
    main([*QUICK, "--data", f"folder:{class_folders}", "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"recipe\.lr|another process"):
        main([*QUICK, "--set", "lr=0.5", "--data", f"folder:{class_folders}", "--out", str(tmp_path)])


def test_random_resized_crop_covers_what_torchvision_covers():
    rng = np.random.default_rng(0)
    image = np.zeros((50, 80, 3), np.uint8)
    image[..., 0] = np.arange(80) * 3
    image[..., 1] = np.arange(50)[:, None] * 5
    crops = [random_resized_crop(image, 16, rng) for _ in range(600)]
    width = np.array([(c[8, -1, 0].astype(int) - c[8, 0, 0]) / 3 for c in crops]) * 16 / 15
    height = np.array([(c[-1, 8, 1].astype(int) - c[0, 8, 1]) / 5 for c in crops]) * 16 / 15
    area = width * height / (50 * 80)

    theirs = np.array(
        [
            RandomResizedCrop.get_params(torch.zeros(3, 50, 80), [0.08, 1], [3 / 4, 4 / 3])[2:]
            for _ in range(600)
        ]
    )
    expected = theirs.prod(1) / (50 * 80)
    assert area.mean() == pytest.approx(expected.mean(), abs=0.04)
    assert np.percentile(area, [10, 90]) == pytest.approx(np.percentile(expected, [10, 90]), abs=0.08)
