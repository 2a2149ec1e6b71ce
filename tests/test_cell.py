"""Run folders: staged keys, what is refused, and that a cell is finished only when cell.json is there."""

import errno
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from backbench.common.backbones.load import load_backbone
from backbench.common.base.errors import UserError
from backbench.common.base.files import file_digest, write_atomic, write_json, write_npz
from backbench.common.base.recipe import Recipe, knob
from backbench.common.run.cell import Identity, code_hash, open_run


@dataclass(frozen=True, kw_only=True)
class Staged(Recipe):
    """A recipe with a field of each stage."""

    beam: int = knob(3, "beam", "P", stage="predict")
    threshold: float = knob(0.5, "threshold", "P", stage="score")


RECIPE = Staged(iterations=3, lr=0.1)


def opened(out, recipe=RECIPE, name=None, **changes):
    inputs = {"train_fingerprint": "t", "test_fingerprint": "v", "seed": 0, "limit": 0} | changes
    return open_run(
        out,
        **{"task": "wsol", "data": "birds", "model": "cam", "recipe": recipe, "recipe_label": "tiny"},
        backbone=load_backbone("scratch:resnet18_half", name=name),
        **inputs,
    )


def complete(run):
    with run.stage("predict", files=["maps.npz"]):
        write_npz(run.folder / "maps.npz", a=np.ones(2))
    with run.stage("score", files=[]):
        pass
    run.finish(
        **{
            "metrics": {"top-1": 0.5},
            "chance": {"top-1": 0.1},
            "primary": "top-1",
            "report": {},
            "report_md": "# r",
        },
        images={"ids": np.array(["a", "b"]), "rank": np.array([0, 1])},
        device=torch.device("cpu"),
        cost={"seconds": 1.0, "iterations": 3, "images": 6},
    )


@pytest.mark.parametrize("name", ["a/b", "../../elsewhere", ".."])
def test_a_backbone_name_is_one_folder(tmp_path, name):
    with pytest.raises(UserError, match=f"backbone name '{name}': .* without /"):
        opened(tmp_path / "results", name=name)
    assert not list(tmp_path.iterdir())


def test_a_cell_is_finished_only_with_cell_json(tmp_path):
    run = opened(tmp_path)
    assert run.folder == tmp_path / "birds/wsol/cam/tiny/scratch/seed0" and not run.finished
    complete(run)
    assert run.finished and opened_again(run, tmp_path).finished
    cell = json.loads((run.folder / "cell.json").read_text())
    assert cell["metrics"] == {"top-1": 0.5} and cell["identity"]["group"] == "scratch"
    assert cell["files"] == {name: file_digest(run.folder / name) for name in cell["files"]}
    assert {"maps.npz", "images.npz", "report.md", "report.json"} <= set(cell["files"])
    (run.folder / "cell.json").unlink()
    assert not opened_again(run, tmp_path).finished


def opened_again(run, out, **changes):
    run.lock.release()  # as the end of the first process would
    return opened(out, **changes)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"threshold": 0.4}, ("train", "predict")),
        ({"beam": 5}, ("train",)),
        ({"lr": 0.2}, ()),
        ({"log_every": 9}, None),
    ],
)
def test_a_field_changes_the_keys_from_its_stage_on(tmp_path, change, kept):
    before = opened(tmp_path / "a").keys
    after = opened(tmp_path / "b", recipe=replace(RECIPE, **change)).keys
    same = {stage for stage in before if before[stage] == after[stage]}
    assert same == (set(before) if kept is None else set(kept))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"limit": 5}, {"train_fingerprint": "x"}, {"protocol": {"train": 2}}]
)
def test_inputs_are_in_the_train_key(tmp_path, change):
    assert opened(tmp_path / "a").keys["train"] != opened(tmp_path / "b", **change).keys["train"]


def test_a_new_score_keeps_training_and_predictions(tmp_path):
    run = opened(tmp_path)
    complete(run)
    again = opened_again(run, tmp_path, recipe=replace(RECIPE, threshold=0.1))
    assert not again.finished and again.done("predict") and not again.done("score")


def test_another_training_in_the_folder_is_refused_and_named(tmp_path):
    run = opened(tmp_path)
    complete(run)
    with pytest.raises(UserError, match=r"recipe\.lr=0\.1 \(now 0\.3\).*--restart"):
        opened_again(run, tmp_path, recipe=replace(RECIPE, lr=0.3))
    assert run.finished  # nothing was touched
    fresh = opened(tmp_path, recipe=replace(RECIPE, lr=0.3), restart=True)
    assert not fresh.finished and not fresh.done("predict")


def test_two_processes_cannot_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("backbench.common.run.cell.PATIENCE", 0)
    run = opened(tmp_path)
    complete(run)
    (run.folder / ".weights.pt.123.tmp").touch()
    for restart in (False, True):
        with pytest.raises(UserError, match="another process is at work there"):
            opened(tmp_path, restart=restart)
    assert run.finished and (run.folder / ".weights.pt.123.tmp").exists()  # nothing was touched
    del run
    again = opened(tmp_path)
    assert again.finished and not list(again.folder.glob(".*.tmp"))


def test_a_stage_that_dies_is_not_done_and_unmakes_the_cell(tmp_path):
    run = opened(tmp_path)
    complete(run)
    with pytest.raises(RuntimeError), run.stage("predict", files=["maps.npz"]):
        raise RuntimeError
    assert not run.finished


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        opened(tmp_path / "file")


def test_identity_path_shows_the_limit():
    identity = Identity("voc", "detection", "ssd300", "tiny", "cutmix", 2, limit=30)
    assert str(identity.path) == "voc/detection/ssd300/tiny+limit=30/cutmix/seed2"


def test_code_hash_ignores_prose(tmp_path, monkeypatch):
    from backbench.common.run import keys

    for name, text in {
        "one": '"""Doc."""\nx = 1  # why\n',
        "two": '"""Other words."""\n\nx = 1\n',
        "three": '"""Doc."""\nx = 2\n',
    }.items():
        (tmp_path / name / "common").mkdir(parents=True)
        (tmp_path / name / "wsol").mkdir()
        (tmp_path / name / "wsol" / "a.py").write_text(text)
    hashes = []
    for name in ("one", "two", "three"):
        monkeypatch.setattr(keys, "ROOT", tmp_path / name)
        code_hash.cache_clear()
        hashes.append(code_hash("wsol"))
    code_hash.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file_and_is_one_line(tmp_path):
    write_json(tmp_path / "x.json", 1)

    def torch_like(file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904  as torch.save does

    with pytest.raises(UserError, match=r"x\.json: no space left"):
        write_atomic(tmp_path / "x.json", torch_like)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and json.loads(
        (tmp_path / "x.json").read_text()
    ) == 1
