"""pretrain/run.py as its users call it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from common.backbone import load_backbone, load_classifier
from common.crops import random_resized_crop
from common.errors import UserError
from pretrain.run import main

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--recipe", "smoke", "--set", "iterations=4"]


@pytest.mark.parametrize("method", ["baseline", "mixup", "cutout", "cutmix"])
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
