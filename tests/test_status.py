"""Status and its reasons, and the checks before the first cell."""

import contextlib
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
from planned_cells import finish, look, save

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_json
from backbench.common.cli.commands import status, to_run
from backbench.common.grid import preflight
from backbench.common.grid.facts import Facts
from backbench.common.grid.plan import (
    Grid,
    Pretraining,
    expected_inputs,
    name_group,
    plan_pretrainings,
    plan_tasks,
    pretrain_job,
)
from backbench.common.grid.plan_file import plan_file, write_plan
from backbench.common.grid.records import record_file, write_record
from backbench.common.grid.status import Status, status_lines, summary_line
from backbench.common.run.keys import ROOT, stage_keys

pytest_plugins = ["planned_cells"]  # its fixtures


def test_status_done_and_drifted(tmp_path, facts, finished):
    job, _ = finished
    assert look(job, tmp_path, facts) == Status(job, "done")
    finish(job, facts, code="of old")
    assert look(job, tmp_path, facts) == Status(job, "done", drifted=True)
    assert to_run([Status(job, "done", drifted=True)], strict=False, replace_stale=False) == [job]
    assert to_run([Status(job, "done", drifted=True)], strict=True, replace_stale=False)[0].restart


def test_status_of_a_folder_without_a_grid_says_what_lists_its_cells(tmp_path):
    with pytest.raises(UserError, match=f"no `backbench run` has planned a grid .* backbench ls {tmp_path}"):
        status(Namespace(grid=tmp_path, all=False))


def test_status_names_the_stale_stage_and_the_changed_input(tmp_path, facts, finished):
    job, file = finished
    before = facts.backbone(str(file))["fingerprint"]
    save(file, "cutmix", 7)
    status = look(job, tmp_path, Facts(facts.file))
    now = facts.backbone(str(file))["fingerprint"]
    assert (status.state, status.stage) == ("stale", "train")
    assert status.why == (f"train: backbone={before} (now {now}), the weights of {file}",)
    with pytest.raises(UserError, match="--replace-stale"):
        to_run([status], strict=False, replace_stale=False)
    assert to_run([status], strict=False, replace_stale=True)[0].restart


def test_status_of_a_changed_score_field_is_stale_in_score_only(tmp_path, facts, finished):
    job, _ = finished
    inputs = expected_inputs(job, facts)
    old = {**inputs, "score": {**inputs["score"], "recipe": {**inputs["score"]["recipe"], "pictures": 99}}}
    finish(job, facts, inputs=old, keys=stage_keys(old))
    status = look(job, tmp_path, facts)
    assert (status.state, status.stage) == (
        "stale",
        "score",
    ) and "score: recipe.pictures=99 (now" in status.why[0]
    assert not to_run([status], strict=False, replace_stale=False)[
        0
    ].restart  # it is scored again, not trained


def test_status_knows_the_arithmetic_of_a_cell(tmp_path, facts, finished):
    job, _ = finished
    inputs = expected_inputs(job, facts)
    trained = {**inputs, "train": {**inputs["train"], "precision": "bf16"}}
    finish(job, facts, inputs=trained, keys=stage_keys(trained))
    assert look(job, tmp_path, facts).state == "done"  # trained by `auto` on another kind of machine
    for used, state in (("fp32", "done"), ("bf16", "stale")):
        cell = read_json(job.folder / "cell.json") | {"inputs": inputs, "keys": stage_keys(inputs)}
        cell.pop("eval_precision", None)
        write_json(job.folder / "cell.json", {**cell, "precision": used})  # as cells of before say it
        assert look(job, tmp_path, facts).state == state
    status = look(job, tmp_path, facts)
    assert (status.stage, status.why) == ("predict", ("predict: eval_precision=bf16 (now fp32)",))


def test_status_of_changed_data(tmp_path, facts, class_folders):
    data = tmp_path / "data"
    shutil.copytree(class_folders, data)
    job = pretrain_job("cutmix", tmp_path / "p", recipe="smoke", arch="resnet18_half", data=f"folder:{data}")
    finish(job, facts)
    assert look(job, tmp_path, facts).state == "to do"  # its backbone file is not there
    job.writes.touch()
    assert look(job, tmp_path, Facts(facts.file)).state == "done"
    shutil.copy(next((data / "val" / "cat").iterdir()), data / "val" / "cat" / "new.jpg")
    status = look(job, tmp_path, Facts(facts.file))
    assert (status.state, status.stage) == ("stale", "predict") and len(status.why) == 1
    assert "predict: data=" in status.why[0] and str(data) in status.why[0]


def test_status_of_an_image_edited_in_place(tmp_path, facts, class_folders):
    """Another size is another input; the same size with other pixels is said, by name, beside a cell that is done."""
    data = tmp_path / "data"
    shutil.copytree(class_folders, data)
    job = pretrain_job("cutmix", tmp_path / "p", recipe="smoke", arch="resnet18_half", data=f"folder:{data}")
    finish(job, facts)
    job.writes.touch()
    image = data / "val" / "cat" / "3.jpg"
    content = image.read_bytes()
    written = (job.folder / "cell.json").stat().st_mtime
    image.write_bytes(content[:-2] + b"\xff\xd9")
    os.utime(image, (written - 60, written - 60))
    assert look(job, tmp_path, Facts(facts.file)) == Status(job, "done")
    os.utime(image, (written + 60, written + 60))
    status = look(job, tmp_path, Facts(facts.file))
    assert status.state == "done" and len(status.why) == 1 and str(image) in status.why[0]
    image.write_bytes(content + b"\0")
    status = look(job, tmp_path, Facts(facts.file))
    assert (status.state, status.stage) == ("stale", "predict")


@pytest.mark.parametrize("told", [True, False])
def test_a_results_folder_is_read_where_it_lies(tmp_path, facts, capsys, monkeypatch, told):
    """A copy shows its own cells, a moved folder is what it was; so are plans that do not say where they were made."""
    monkeypatch.setattr("backbench.common.cli.commands.Facts", lambda: Facts(facts.file))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results"
    grid = Grid(recipe="smoke", out=out, pretrain=(Pretraining("cutmix"),))
    jobs, backbones = plan_pretrainings(grid, facts)
    backbones += name_group("", ["scratch:resnet18_half"], facts)
    file = save(jobs[0].writes, "cutmix", 0)
    jobs += plan_tasks(grid, backbones, ["wsol"], facts)
    (out / "grid").mkdir()
    write_plan(out, jobs)
    if not told:
        plan = read_json(plan_file(out))
        write_json(plan_file(out), {k: v for k, v in plan.items() if k != "out"})
    for job in jobs:
        finish(job, facts)
        write_record(out / "grid", job, "done")

    def seen(folder):
        capsys.readouterr()
        status(Namespace(grid=folder, all=False))
        return capsys.readouterr().out.splitlines()[-1]

    assert seen(out) == "3 cells: 3 done"
    copy = tmp_path / "elsewhere" / "copied"
    shutil.copytree(out, copy)
    *_, last = jobs  # of random weights
    (copy / last.folder.relative_to(out) / "cell.json").unlink()
    assert seen(copy) == "3 cells: 2 done, 1 to do" and seen(out) == "3 cells: 3 done"
    write_record(out / "grid", last, "running", pid=os.getpid())
    monkeypatch.setattr(
        "backbench.common.grid.status.at_work", lambda record, job: record.get("state") == "running"
    )
    shutil.copy(record_file(out / "grid", last), copy / "grid")
    assert seen(copy) == "3 cells: 2 done, 1 to do" and "1 running" in seen(out)
    write_record(out / "grid", last, "done")
    save(copy / "pretrain" / "cutmix" / "cutmix.pt", "cutmix", 5)  # other weights in the copy alone
    assert "1 stale" in seen(copy) and seen(out) == "3 cells: 3 done"
    (tmp_path / "results").rename(tmp_path / "moved")
    assert not (tmp_path / file).exists() and seen(tmp_path / "moved") == "3 cells: 3 done"


def test_status_of_results_whose_data_is_elsewhere(tmp_path, facts, class_folders):
    data = tmp_path / "data"
    shutil.copytree(class_folders, data)
    job = pretrain_job("cutmix", tmp_path / "p", recipe="smoke", arch="resnet18_half", data=f"folder:{data}")
    finish(job, facts)
    job.writes.touch()
    data.rename(tmp_path / "gone")
    found = look(job, tmp_path, Facts(facts.file))
    assert found.state == "done" and "not checked" in found.why[0] and str(data) in found.why[0]


def test_status_failed_running_and_to_do(tmp_path, facts, finished):
    job, file = finished
    records = tmp_path / "results" / "grid"
    records.mkdir()
    (job.folder / "cell.json").unlink()
    assert look(job, tmp_path, facts).state == "to do"
    (job.folder / "log.jsonl").write_text('{"iteration": 4}\n')
    assert look(job, tmp_path, facts).why == ("at iteration 4",)
    write_record(records, job, "failed", why="exit code 1")
    (records / "wsol~cam~cutmix~seed0.log").write_text("one\ntwo\nthree\nRuntimeError: a bug\n")
    status = look(job, tmp_path, facts)
    assert status.state == "failed" and status.why == ("exit code 1", "two", "three", "RuntimeError: a bug")
    code = f"import fcntl, time; f = open({str(job.folder / '.lock')!r}, 'w'); fcntl.flock(f, 2); print(1, flush=True)"
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(1e6)"], stdout=subprocess.PIPE)
        stack.callback(process.wait)
        stack.callback(process.kill)
        process.stdout.readline()
        assert look(job, tmp_path, facts) == Status(job, "running", ("at iteration 4",))
    process.stdout.close()
    assert look(job, tmp_path, facts).state == "failed"
    file.unlink()
    write_record(records, job, "running", pid=os.getpid())  # another process has that number now
    assert look(job, tmp_path, facts).why == (f"{file} is not there",)


def test_status_lines(finished):
    job, _ = finished
    found = [
        Status(job, "done"),
        Status(job, "done", drifted=True),
        Status(job, "stale", ("train: lr=1 (now 2)",), stage="train"),
        Status(job, "to do"),
    ]
    lines = status_lines(found)
    assert lines[-1] == summary_line(found) == "4 cells: 2 done (1 of them by other code), 1 stale, 1 to do"
    assert lines[0].split() == ["code", "drifted", job.name] and lines[1].split() == [
        "stale:",
        "train",
        job.name,
    ]
    assert (
        lines[2].strip() == "train: lr=1 (now 2)" and len(lines) == 5 and len(status_lines(found, True)) == 6
    )


def test_status_reads_nothing_again_while_nothing_changes(tmp_path, facts, finished, monkeypatch):
    job, _ = finished
    monkeypatch.setattr("backbench.common.backbones.load.load_backbone", None)
    monkeypatch.setattr("backbench.common.data.open_localisation", None)
    monkeypatch.setattr("backbench.common.grid.facts._read_recipes", None)
    monkeypatch.setattr("backbench.common.grid.facts.code_hash", None)
    assert look(job, tmp_path, Facts(facts.file)).state == "done"
    (tmp_path / "facts.json").write_text("not JSON")
    with pytest.raises((TypeError, AttributeError)):  # a damaged memory is none: all is read again
        look(job, tmp_path, Facts(tmp_path / "facts.json"))


def test_status_imports_no_torch():
    code = (
        "import sys; from backbench.common.cli.main import arguments; arguments('status'); "
        "import backbench.common.cli.commands; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_checks_refuse_a_full_disk_and_name_what_is_there(tmp_path, facts, finished, monkeypatch):
    job, file = finished
    lines = preflight.check([job], facts, tmp_path)
    assert any(line.startswith("data: wsol scenes:size=smoke: ") for line in lines)
    assert any(str(file) in line and "resnet18_half" in line for line in lines)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 2**20))
    with pytest.raises(UserError, match=r"0\.0 GB free, about 0\.2 GB needed for 1 cells"):
        preflight.check([job], facts, tmp_path)


def test_java_missing_is_a_warning(monkeypatch):
    monkeypatch.setenv("BACKBENCH_JAVA", "none")
    assert preflight.check_java() == "warning: Java: no Java (BACKBENCH_JAVA=none); METEOR will read n/a"
    monkeypatch.delenv("BACKBENCH_JAVA")
    assert preflight.check_java().startswith("Java: ")


def test_time_is_estimated_from_finished_cells(tmp_path, facts, finished):
    job, _ = finished
    jobs = [replace(job, name=f"wsol/cam/x/seed{k}") for k in range(4)] + [
        replace(job, name="detection/ssd300/x/s")
    ]
    known = preflight.estimates(jobs, [Status(job, "done")])
    assert known == {"wsol/cam": 30.0}
    line = preflight.time_line(jobs, known, (), 2)
    assert line == (
        "time: about 0:01 h for 4 of 5 cells (from finished cells: wsol/cam; unknown: detection/ssd300)"
    )
    assert preflight.time_line(jobs, {}, (), 1).startswith("time: unknown before the first cells end")
    assert "calibrated: detection/ssd300" in preflight.time_line(
        jobs, known | {"detection/ssd300": 9.0}, ["detection/ssd300"], 1
    )
