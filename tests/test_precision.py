"""Which arithmetic: fp32 wherever a score comes from, training's own resolved once; on any machine."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import finetune_args
from test_captioning import command as captions_command
from test_captioning import write_walls
from test_cell import RECIPE, complete, opened
from test_wsol import arguments as wsol_arguments
from test_wsol import write_cub

from backbench.captioning import finetune as captions
from backbench.captioning.data import pooled_features
from backbench.captioning.recipes import RECIPES as CAPTIONS
from backbench.common.backbones.load import load_backbone
from backbench.common.backbones.resnet import Classifier
from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_json
from backbench.common.classify.step import ClassifyRecipe, predict_logits
from backbench.common.engine import loop, resolve_precision
from backbench.detection import finetune as detection
from backbench.pretrain import evaluate, robustness, run
from backbench.pretrain.recipes import ROBUSTNESS
from backbench.wsol import finetune as wsol

pytest_plugins = ["shapes"]  # its fixtures

CPU = torch.device("cpu")
PROBES = ("avx512_bf16", "amx_tile")


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this a CPU with or without native bf16."""

    def become(native: bool) -> None:
        for name in PROBES:
            monkeypatch.setattr(f"torch.cpu._is_{name}_supported", lambda: native)
        assert resolve_precision("auto", CPU) == ("bf16" if native else "fp32")

    return become


@pytest.fixture
def seen(monkeypatch):
    """How convolutions ran: a set of (whether for a gradient of weights, whether in bf16)."""
    found = set()

    def watch(module, _):
        if isinstance(module, torch.nn.Conv2d):
            found.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    yield found
    handle.remove()


def transfer(task, tmp_path, devkit, backbone):
    """A short training on tiny data in the arithmetic of the machine: (main, arguments)."""
    out = tmp_path / "out"
    auto = ("--set", "precision=auto")
    if task in ("ssd300", "faster_rcnn"):
        return detection.main, finetune_args(devkit, backbone, out, task, *auto)
    if task == "wsol":
        more = ("--set", "precision=auto", "--set", "iterations=2", "--set", "threshold=0.15")
        data = write_cub(tmp_path / "birds")
        return wsol.main, [*wsol_arguments(data, out), *more]
    short = ("--set", "iterations=2", "--set", "beam=2", "--backbone", str(backbone))
    return captions.main, [*captions_command(write_walls(tmp_path / "walls"), out)[2:], *short]


@pytest.mark.parametrize("task", ["ssd300", "faster_rcnn", "captioning", "wsol"])
def test_transfer_trains_as_the_machine_and_scores_in_fp32(
    task,
    machine,
    seen,
    devkit,
    backbone,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    machine(True)
    main, arguments = transfer(task, tmp_path, devkit, backbone)
    assert main(arguments) == 0
    cell = read_json(next((tmp_path / "out").rglob("cell.json")))
    assert (cell["train_precision"], cell["eval_precision"]) == ("bf16", "fp32")
    # a frozen encoder of captions computes features, nothing else convolves; frozen stages have no gradient either
    assert (False, False) in seen and ((True, True) in seen) == (task != "captioning")
    assert seen <= {(True, True), (False, False)}
    seen.clear()
    assert main(arguments) == 0 and not seen  # finished
    assert main([*arguments, "--set", "eval_precision=bf16"]) == 0
    cell = read_json(next((tmp_path / "out").rglob("cell.json")))
    assert (cell["train_precision"], cell["eval_precision"]) == ("bf16", "bf16")
    assert (False, True) in seen and (True, True) not in seen  # predicted again, not trained


def pretrained(out, class_folders, *more):
    arguments = ["--recipe", "smoke", "--set", "iterations=4", "--data", f"folder:{class_folders}"]
    return run.main([*arguments, "--device", "cpu", "--out", str(out), *more])


def test_pretraining_validates_and_predicts_in_fp32(class_folders, machine, seen, tmp_path):
    machine(True)
    more = ("--set", "val_share=0.34", "--set", "eval_every=1")
    assert pretrained(tmp_path / "a", class_folders, *more) == 0
    assert seen == {(True, True), (False, False)}
    cell = read_json(tmp_path / "a/cell.json")
    assert (cell["train_precision"], cell["eval_precision"]) == ("bf16", "fp32")
    assert cell["inputs"]["train"]["precision"] == "bf16"


def test_a_classifier_scores_the_same_on_every_machine(class_folders, machine, seen, tmp_path):
    machine(False)
    assert pretrained(tmp_path / "run", class_folders) == 0
    answers, cells = [], []
    for native in (False, True):
        machine(native)
        seen.clear()
        out = tmp_path / f"scores{native}"
        fixed = ["--backbone", str(tmp_path / "run/baseline.pt"), "--data", f"folder:{class_folders}"]
        assert evaluate.main([*fixed, "--out", str(out)]) == 0
        assert (
            robustness.main([*fixed, "--recipe", "smoke", "--out", str(out), "--tests", "fgsm", "occlusion"])
            == 0
        )
        assert {bf16 for _, bf16 in seen} == {False}
        files = sorted(out.rglob("predictions.npz"))
        assert len(files) == 3
        answers.append([{k: v.tobytes() for k, v in np.load(path).items()} for path in files])
        cells.append([read_json(path.parent / "cell.json") for path in files])
    assert answers[0] == answers[1]
    for one, other in zip(*cells):
        assert one["keys"] == other["keys"] and one["metrics"] == other["metrics"]
        assert one["train_precision"] is None and one["eval_precision"] == "fp32"
    with pytest.raises(UserError, match="nothing is trained here; --set eval_precision=bf16"):
        evaluate.main([*fixed, "--out", str(out), "--set", "precision=bf16"])


def test_bf16_answers_are_close_where_they_are_asked_for(backbone):
    model = Classifier(load_backbone(str(backbone)).trunk, 5)
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    found = {
        precision: predict_logits(
            model, images, ClassifyRecipe(epochs=1, eval_precision=precision), CPU, (0.5,) * 3, (0.25,) * 3
        )
        for precision in ("fp32", "bf16")
    }
    assert not np.array_equal(found["fp32"], found["bf16"])
    np.testing.assert_allclose(found["bf16"], found["fp32"], atol=0.05 * np.abs(found["fp32"]).max())


def test_cached_features_of_each_arithmetic_are_kept_apart(backbone, class_folders):
    loaded = load_backbone(str(backbone))
    paths = sorted((class_folders / "val/cat").iterdir())[:3]
    recipe = CAPTIONS["smoke"]
    found = [pooled_features(loaded, paths, recipe, CPU, 1, p) for p in ("fp32", "bf16", "fp32")]
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])
    np.testing.assert_allclose(found[1], found[0], atol=0.05 * found[0].max())


def begun(out, recipe=RECIPE, **changes):
    return opened(out, recipe, trained_on=CPU, **changes)


def test_auto_is_in_the_train_key_only_where_it_is_not_fp32(tmp_path, machine):
    machine(False)
    plain = opened(tmp_path / "a").keys
    assert begun(tmp_path / "b").keys == plain
    machine(True)
    native = begun(tmp_path / "c")
    assert native.keys["train"] != plain["train"] and native.training.precision == "bf16"
    for precision in ("fp32", "bf16"):  # asked for: in the recipe's fields, the same everywhere
        asked, keys = replace(RECIPE, precision=precision), []
        for number, here in enumerate((True, False)):
            machine(here)
            keys.append(begun(tmp_path / f"{precision}{number}", asked).keys)
        assert keys[0] == keys[1] != plain


@pytest.mark.parametrize("native", [False, True])
def test_a_run_keeps_the_arithmetic_it_began_with(native, tmp_path, machine):
    machine(native)
    first = begun(tmp_path)
    began = first.training.precision
    assert not first.notes
    first.lock.release()
    machine(not native)
    again = begun(tmp_path)
    assert again.keys == first.keys and again.training.precision == began
    assert again.notes == [
        f"precision=auto was {began} where this training began, and stayed so; here it is "
        f"{'fp32' if native else 'bf16'}"
    ]
    complete(again)
    cell = read_json(again.folder / "cell.json")
    assert (cell["train_precision"], cell["eval_precision"]) == (began, "fp32")
    again.lock.release()
    last = begun(tmp_path)
    assert last.finished
    last.lock.release()
    fresh = begun(tmp_path, restart=True)
    assert fresh.training.precision == ("fp32" if native else "bf16") and not fresh.notes


@pytest.mark.parametrize("native", [False, True])
def test_a_training_resumed_on_another_kind_of_machine_ends_with_the_same_weights(
    native, class_folders, machine, monkeypatch, tmp_path
):
    class Killed(Exception):
        pass

    def die(self):
        save(self)
        if self.iteration == 2:
            raise Killed

    save = loop._Training.save
    machine(native)
    assert pretrained(tmp_path / "whole", class_folders) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Training, "save", die)
        pretrained(tmp_path / "cut", class_folders, "--set", "save_every=0")
    machine(not native)
    assert pretrained(tmp_path / "cut", class_folders, "--set", "save_every=0") == 0
    whole, cut = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole["key"] == cut["key"]
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    assert "precision=auto was" in " ".join(read_json(tmp_path / "cut/cell.json")["notes"])


def as_before(run, precision):
    """Make a finished run look as it was written when evaluation had training's arithmetic."""
    path = run.folder / "cell.json"
    cell = read_json(path)
    del cell["train_precision"], cell["eval_precision"]
    write_json(path, {**cell, "precision": precision})
    stages = read_json(run.folder / "stages.json")
    del stages["predict"]["eval_precision"]
    write_json(run.folder / "stages.json", stages)
    made = read_json(run.folder / "recipe.json")
    del made["train_precision"], made["recipe"]["eval_precision"]
    write_json(run.folder / "recipe.json", made)


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize("used", ["fp32", "bf16"])
def test_cells_of_before_stay_finished_only_if_they_were_evaluated_in_fp32(used, here, tmp_path, machine):
    machine(False)  # the keys of before name no machine
    first = begun(tmp_path)
    complete(first)
    as_before(first, used)
    first.lock.release()
    machine(here)
    again = begun(tmp_path)
    assert again.keys == first.keys and again.training.precision == used  # never trained again
    assert again.finished == again.done("predict") == (used == "fp32")
    if used == "bf16":
        complete(again)
        cell = read_json(again.folder / "cell.json")
        assert again.finished and (cell["train_precision"], cell["eval_precision"]) == ("bf16", "fp32")


def test_robustness_in_fp32_has_the_keys_it_always_had():
    for test, said in (("fgsm", "fp32"), ("occlusion", "auto"), ("between", "auto"), ("ood", "auto")):
        recipe = replace(ROBUSTNESS["smoke"], test=test)
        assert recipe.stage_fields("predict")["precision"] == said
        assert replace(recipe, precision="bf16").stage_fields("predict")["precision"] == "bf16"


def test_evaluation_in_another_arithmetic_is_another_prediction(tmp_path):
    asked = replace(RECIPE, eval_precision="bf16")
    keys = [opened(tmp_path / name, recipe).keys for name, recipe in (("a", RECIPE), ("b", asked))]
    assert keys[0]["train"] == keys[1]["train"] and keys[0]["predict"] != keys[1]["predict"]


def test_fp32_is_fp32_whatever_the_environment_allows():
    code = (
        "import backbench.common, os, torch\n"
        "torch.set_float32_matmul_precision('medium')\n"
        "from backbench.common.engine import pick_device\n"
        "pick_device('cpu')\n"
        "print(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,"
        " torch.backends.cudnn.allow_tf32, os.environ['ONEDNN_DEFAULT_FPMATH_MODE'],"
        " os.environ.get('TORCH_ALLOW_TF32_CUBLAS_OVERRIDE'))"
    )
    loose = {"ONEDNN_DEFAULT_FPMATH_MODE": "ANY", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **loose}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["highest", "False", "False", "STRICT", "None"]
