"""The grid: plans, names and groups, the local executor with fake cells, status and its reasons, sweeps, reruns."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.backbone import load_backbone, save_backbone
from common.board import preflight, rerun, sweep
from common.board.cells import load_cells
from common.board.commands import grid_of_arguments, to_run
from common.board.facts import Facts
from common.board.grid import places, run_jobs, visible_gpus
from common.board.plan import (
    Grid,
    Job,
    expected_inputs,
    grid_of,
    jobs_of_json,
    jobs_to_json,
    name_group,
    only,
    parse_backbone,
    plan_pretrainings,
    plan_tasks,
    pretrain_job,
    read_grid,
)
from common.board.records import may_retry, read_record, write_record
from common.board.status import Status, look_at, status_lines, summary_line
from common.cli import arguments
from common.errors import UserError
from common.files import file_digest, write_json
from common.keys import ROOT, stage_keys
from common.trunk import Classifier

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

how, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
tries = len((folder / "tries").read_text()) if (folder / "tries").exists() else 0
(folder / "tries").write_text("x" * (tries + 1))
print("threads", os.environ["OMP_NUM_THREADS"], "gpu", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if how == "user":
    print("error: no such thing")
    sys.exit(2)
if how == "crash":
    raise RuntimeError("a bug")
if how == "dies" or how == "dies_once" and not tries:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "stopped_once" and not tries:
    sys.exit(75)
if how == "sleeps":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
    (folder / "asleep").touch()
    time.sleep(60)
if how == "writes":
    (folder / "made.pt").touch()
if how != "empty":
    (folder / "cell.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A maker of jobs that run a fake task: fake(name, how, …)."""
    (tmp_path / "faketask").mkdir()
    (tmp_path / "faketask" / "cell.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    visible_gpus.cache_clear()

    def make(name, how="fine", **more):
        folder = tmp_path / "out" / name
        return Job(name, ("faketask.cell", how, str(folder)), "wsol", folder, **more)

    return make


def states(outcomes):
    return {outcome.job.name: outcome.state for outcome in outcomes}


def test_one_failing_cell_never_stops_the_others_and_is_not_retried_for_a_user_error(fake, tmp_path, capsys):
    jobs = [fake("a/user", "user"), fake("a/crash", "crash"), fake("a/empty", "empty"), fake("a/fine")]
    assert states(run_jobs(jobs, tmp_path / "grid", slots=2)) == {
        "a/user": "failed",
        "a/crash": "failed",
        "a/empty": "failed",
        "a/fine": "done",
    }
    assert [(job.folder / "tries").read_text() for job in jobs] == ["x"] * 4
    printed = capsys.readouterr().out
    assert "exit code 2: error: no such thing" in printed and "left no cell" in printed
    assert read_record(tmp_path / "grid", jobs[1])["why"] == "exit code 1"


def test_a_killed_or_stopped_cell_is_tried_once_more(fake, tmp_path, capsys):
    jobs = [fake("a/dies_once", "dies_once"), fake("a/stopped", "stopped_once"), fake("a/dies", "dies")]
    assert states(run_jobs(jobs, tmp_path / "grid")) == {
        "a/dies_once": "done",
        "a/stopped": "done",
        "a/dies": "failed",
    }
    assert [(job.folder / "tries").read_text() for job in jobs] == ["xx"] * 3
    assert "out of memory?" in capsys.readouterr().out


def test_which_exits_are_retried():
    assert all(may_retry(code) for code in (-9, -15, -11, 75, 137, 143))
    assert not any(may_retry(code) for code in (1, 2, 3))


def test_what_is_done_is_not_started_and_a_restart_is(fake, tmp_path):
    jobs = [fake("a/one"), fake("a/two")]
    run_jobs(jobs, tmp_path / "grid")
    assert states(run_jobs(jobs, tmp_path / "grid")) == {"a/one": "done before", "a/two": "done before"}
    again = [replace(jobs[0], restart=True), jobs[1]]
    assert states(run_jobs(again, tmp_path / "grid")) == {"a/one": "done", "a/two": "done before"}


def test_a_job_waits_for_its_backbone_and_fails_with_it(fake, tmp_path, capsys):
    made = tmp_path / "out" / "pre" / "made.pt"
    jobs = [
        fake("uses", backbone=str(made), needs="pre"),
        fake("pre", "writes", writes=made),
        fake("uses_none", backbone=str(tmp_path / "never.pt"), needs="bad"),
        fake("bad", "user", writes=tmp_path / "never.pt"),
    ]
    found = run_jobs(jobs, tmp_path / "grid", slots=2)
    assert states(found) == {"uses": "done", "pre": "done", "uses_none": "failed", "bad": "failed"}
    assert [outcome.job.name for outcome in found] == [job.name for job in jobs]  # in the plan's order
    assert "never.pt is not there" in capsys.readouterr().out


def test_slots_share_the_cores_or_the_gpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    visible_gpus.cache_clear()
    assert places(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    visible_gpus.cache_clear()
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(2)] == ["1", "3", "1", "3"]
    assert {place["OMP_NUM_THREADS"] for place in places(2)} == {"2"}
    visible_gpus.cache_clear()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_grid_that_dies_leaves_no_cell_behind_and_goes_on(fake, tmp_path, number):
    job = fake("a/sleeps", "sleeps")
    script = (
        "import json, sys; from pathlib import Path\n"
        "from common.board.grid import run_jobs; from common.board.plan import jobs_of_json\n"
        f"run_jobs(jobs_of_json(json.loads({json.dumps(json.dumps(jobs_to_json([job])))})), Path({str(tmp_path)!r}))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (job.folder / "asleep").exists() and time.monotonic() < until:
        time.sleep(0.02)
    record = read_record(tmp_path, job)
    assert record["state"] == "running"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -9, signal.SIGINT: -2}[number] or (
        number == signal.SIGINT and process.returncode in (1, 130)
    )
    assert (job.folder / "saved").exists() == (number != signal.SIGKILL)  # asked to save, where one could ask
    until = time.monotonic() + 10
    while is_alive(record["pid"]) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_alive(record["pid"])
    going_on = replace(job, command=(job.command[0], "fine", job.command[2]))
    assert states(run_jobs([going_on], tmp_path)) == {"a/sleeps": "done"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# plans


def save(path: Path, method: str | None = None, seed: int | None = None) -> str:
    """A tiny backbone file of ours, or a plain state dict."""
    backbone = load_backbone("scratch:resnet18_half", seed=len(path.name) * 100 + (seed or 0))
    for name, buffer in backbone.trunk.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.1  # trained batch norm
    classifier = Classifier(backbone.trunk, 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    if method is None:
        torch.save(classifier.torchvision_state(), path)
    else:
        save_backbone(path, classifier, arch="resnet18_half", num_classes=4, method=method, seed=seed)
    return str(path)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Where facts are remembered between the tests: reading the recipes takes seconds."""
    return tmp_path_factory.mktemp("facts") / "facts.json"


@pytest.fixture
def facts(memory):
    return Facts(memory)


def smoke(tmp_path, **more) -> Grid:
    return Grid(recipe="smoke", out=tmp_path / "results", **more)


def test_files_of_a_group_are_its_pretraining_seeds(tmp_path, facts):
    files = [save(tmp_path / f"s{seed}" / "cutmix.pt", "cutmix", seed) for seed in (0, 1, 2)]
    named = name_group("mine", files, facts)
    assert [b.name for b in named] == ["mine-p0", "mine-p1", "mine-p2"] and {b.group for b in named} == {
        "mine"
    }
    plain = name_group("", files, facts)  # as the files say
    assert [(b.label, b.name, b.group) for b in plain] == [
        ("cutmix", "", ""),
        ("cutmix-p1", "", ""),
        ("cutmix-p2", "", ""),
    ]
    foreign = [save(tmp_path / name) for name in ("x.pth", "yy.pth")]
    assert [b.name for b in name_group("theirs", foreign, facts)] == ["theirs-p0", "theirs-p1"]
    assert [b.name for b in name_group("one", foreign[:1], facts)] == ["one"]
    shutil.copy(files[0], tmp_path / "copy.pt")
    with pytest.raises(UserError, match="same pretraining"):
        name_group("mine", [files[0], str(tmp_path / "copy.pt")], facts)
    with pytest.raises(UserError, match=r"absent\.pt: no such backbone file"):
        name_group("", ["absent.pt"], facts)


def test_commands_say_name_and_group_and_cells_lie_where_the_task_will_write_them(tmp_path, facts):
    files = [save(tmp_path / f"s{seed}" / "cutmix.pt", "cutmix", seed) for seed in (0, 1)]
    grid = smoke(tmp_path, seeds=2, limit=5)
    backbones = [*name_group("mine", files, facts), *name_group("", ["scratch:resnet18_half"], facts)]
    jobs = plan_tasks(grid, backbones, ["wsol", "ssd300"], facts)
    assert len(jobs) == 3 * 2 * 2 and [job.seed for job in jobs] == [0] * 6 + [1] * 6
    job = next(j for j in jobs if j.name == "wsol/cam/mine-p1/seed1")
    assert job.folder == tmp_path / "results/scenes-smoke/wsol/cam/smoke+limit=5/mine-p1/seed1"
    text = " ".join(job.command)
    assert text.startswith("wsol.finetune --backbone") and "--name mine-p1 --group mine --limit 5" in text
    assert jobs_of_json(json.loads(json.dumps(jobs_to_json(jobs)))) == jobs
    assert [j.name for j in only(jobs, "ssd300/mine-p0")] == [
        f"detection/ssd300/mine-p0/seed{k}" for k in (0, 1)
    ]
    assert len(only(jobs, "wsol/*/seed0")) == 3
    with pytest.raises(UserError, match="matches none of 12"):
        only(jobs, "nothing")
    with pytest.raises(UserError, match="two backbones are called mine-p0"):
        plan_tasks(grid, [backbones[0], backbones[0]], ["wsol"], facts)


def test_pretrainings_are_cells_that_the_transfers_wait_for(tmp_path, facts):
    jobs, backbones = plan_pretrainings(
        smoke(tmp_path, pretrain=grid_of({"pretrain": ["cutmix:seeds=2"]}).pretrain), facts
    )
    assert [job.name for job in jobs] == ["pretrain/cutmix", "pretrain/cutmix-p1"]
    assert jobs[1].writes == tmp_path / "results/pretrain/cutmix-p1/cutmix.pt"
    transfers = plan_tasks(smoke(tmp_path), backbones, ["wsol"], facts)
    assert [job.needs for job in transfers] == [job.name for job in jobs]
    assert [job.folder.parent.name for job in transfers] == ["cutmix", "cutmix-p1"]
    assert only([*jobs, *transfers], "wsol/cam/cutmix-p1/*") == [jobs[1], transfers[1]]  # with what it needs


def test_a_field_is_set_for_every_task_a_room_a_task_or_the_pretrainings(tmp_path, facts):
    fields = {"lr": 0.1, "detection": {"lr": 0.2, "batch": 2}, "ssd300.lr": 0.3, "pretrain": {"size": 48}}
    grid = smoke(
        tmp_path,
        **{k: getattr(grid_of({"set": fields, "pretrain": ["cutmix"]}), k) for k in ("set", "pretrain")},
    )
    jobs = plan_tasks(
        grid, name_group("", ["scratch:resnet18_half"], facts), ["ssd300", "faster_rcnn", "wsol"], facts
    )
    settings = {job.model: job.command[job.command.index("--set") :] for job in jobs}
    assert settings == {
        "ssd300": ("--set", "lr=0.3", "--set", "batch=2"),
        "faster_rcnn": ("--set", "lr=0.2", "--set", "batch=2"),
        "cam": ("--set", "lr=0.1"),
    }
    assert [job.folder.parts[-3] for job in jobs] == [
        "smoke+batch=2+lr=0.3",
        "smoke+batch=2+lr=0.2",
        "smoke+lr=0.1",
    ]
    (pretraining,), _ = plan_pretrainings(grid, facts)
    assert pretraining.command[-2:] == ("--set", "size=48")
    with pytest.raises(UserError, match="no field 'rate'"):
        plan_tasks(
            replace(grid, set={"wsol.rate": "1"}),
            name_group("", ["scratch:resnet18_half"], facts),
            ["wsol"],
            facts,
        )


def test_toml_and_options_give_the_same_grid(tmp_path, monkeypatch):
    file = tmp_path / "grid.toml"
    file.write_text(
        'recipe = "paper"\nseeds = 5\ntasks = ["wsol", "detection"]\nexecutor = "slurm"\nout = "there"\n'
        '[backbones]\ncutmix = ["a.pt", "b.pt"]\nr50 = "torchvision:resnet50"\n[pretrain]\nmixup = {seeds = 3}\n'
        '[data]\ndetection = "voc:V,year=2007"\n[set]\nlr = 0.1\nssd300.anchors = [1, 2]\n'
        '[slurm]\npartition = "gpu"\ntimeout_min = 60\n'
    )
    monkeypatch.chdir(tmp_path)
    words = (
        "run --recipe paper --seeds 5 --tasks wsol detection --executor slurm --out there "
        "--backbones cutmix=a.pt,b.pt r50=torchvision:resnet50 --pretrain mixup:seeds=3 "
        "--data detection=voc:V,year=2007 --set lr=0.1 ssd300.anchors=1,2 --slurm partition=gpu timeout_min=60"
    )
    given = grid_of_arguments(arguments("run").parse_args(words.split()))
    assert read_grid(file) == given
    beside = grid_of_arguments(arguments("run").parse_args(["run", str(file), "--seeds", "2"]))
    assert beside == replace(given, seeds=2)
    assert parse_backbone("scratch:resnet50") == ("", ("scratch:resnet50",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = ", "not valid TOML"),
        ("seed = 3", "seed: unknown; the keys are"),
        ('seeds = "3"', "a int is expected"),
        ("seeds = 0\nbackbones = ['a']", "at least 1"),
        ("seeds = 2", "no backbones"),
        ("backbones = ['a']\nexecutor = 'cloud'", "local, slurm or print"),
        ("backbones = ['a']\n[data]\nsegmentation = 'x'", "data segmentation: unknown"),
        ("backbones = ['a']\n[set.ssd]\nlr = 1", "ssd is neither pretrain nor one of ssd300"),
        ("pretrain = ['cutmix:seeds=x']", "METHOD:seeds=N"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "grid.toml").write_text(text)
    with pytest.raises(UserError, match=r"grid\.toml: ") as caught:
        read_grid(tmp_path / "grid.toml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


# status


@pytest.fixture
def finished(tmp_path, facts):
    """A planned cell of a file of ours that is finished as far as its cell.json says: (job, file)."""
    file = Path(save(tmp_path / "cutmix.pt", "cutmix", 0))
    (job,) = plan_tasks(smoke(tmp_path), name_group("", [str(file)], facts), ["wsol"], facts)
    finish(job, facts)
    return job, file


def finish(job: Job, facts: Facts, **changes) -> None:
    inputs = expected_inputs(job, facts)
    cell = {
        "keys": stage_keys(inputs),
        "inputs": inputs,
        "code": facts.code(job.room),
        "cost": {"train_s": 30.0},
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "cell.json", cell | changes)


def look(job, tmp_path, facts):
    return look_at([job], tmp_path / "results" / "grid", facts)[0]


def test_status_done_and_drifted(tmp_path, facts, finished):
    job, _ = finished
    assert look(job, tmp_path, facts) == Status(job, "done")
    finish(job, facts, code="of old")
    assert look(job, tmp_path, facts) == Status(job, "done", drifted=True)
    assert to_run([Status(job, "done", drifted=True)], strict=False, replace_stale=False) == [job]
    assert to_run([Status(job, "done", drifted=True)], strict=True, replace_stale=False)[0].restart


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
        process = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE)
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
    monkeypatch.setattr("common.backbone.load_backbone", None)
    monkeypatch.setattr("common.data.open_localisation", None)
    monkeypatch.setattr("common.board.facts._read_recipes", None)
    monkeypatch.setattr("common.board.facts.code_hash", None)
    assert look(job, tmp_path, Facts(facts.file)).state == "done"
    (tmp_path / "facts.json").write_text("not JSON")
    with pytest.raises((TypeError, AttributeError)):  # a damaged memory is none: all is read again
        look(job, tmp_path, Facts(tmp_path / "facts.json"))


def test_status_imports_no_torch():
    code = (
        "import sys; from common.cli import arguments; arguments('status'); import common.board.commands; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# before the first cell


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


# sweeps


def test_a_sweep_gives_every_backbone_the_same_trials_and_one_label(tmp_path, facts):
    grid = smoke(tmp_path, sweep="lr=0.1,0.01,0.001", val_share=0.25)
    backbones = name_group("mine", [save(tmp_path / "a.pth")], facts) + name_group(
        "", ["scratch:resnet18_half"], facts
    )
    trials = sweep.plan_sweep(grid, backbones, ["wsol"], facts)
    assert len(trials) == 6 and all("--val-share 0.25" in " ".join(job.command) for job in trials)
    assert {job.folder.parents[1].name for job in trials} == {
        f"smoke+lr={v}+val=0.25" for v in ("0.1", "0.01", "0.001")
    }
    assert sweep.plan_chosen(grid, backbones, ["wsol"], facts) == []  # no trial is there yet
    for number, job in enumerate(trials):
        score = [0.1, 0.1, 0.3, 0.2, 0.2, 0.25][number]
        write_json_cell(job.folder, {"metrics": {"Top-1 Loc": score}, "primary": "Top-1 Loc"})
    chosen = {job.name: job for job in sweep.plan_chosen(grid, backbones, ["wsol"], facts)}
    assert {name: job.recipe[3] for name, job in chosen.items()} == {
        "wsol/cam/mine/seed0": ("lr=0.01",),
        "wsol/cam/scratch/seed0": ("lr=0.001",),
    }
    assert {job.folder.parents[1].name for job in chosen.values()} == {"smoke+lr=best_of_0.1_0.01_0.001"}
    assert "--swept lr=0.1,0.01,0.001 --set lr=0.001" in " ".join(chosen["wsol/cam/scratch/seed0"].command)


def write_json_cell(folder: Path, content: dict) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "cell.json", content)


def test_a_bad_sweep_is_refused():
    for text in ("lr", "lr=", "lr=1", "lr=1,1", "iterations=1,2", "batch=8,16"):
        with pytest.raises(UserError, match="--sweep"):
            sweep.parse_sweep(text)


def test_held_out_images_are_training_images_and_a_key_of_their_own(facts):
    from common.transfer import hold_out

    whole = facts.data("detection", "scenes:size=smoke")
    part = facts.data("detection", "scenes:size=smoke", 0, 0.25)
    assert part["train_images"] + part["test_images"] == whole["train_images"]
    assert len({part["train"], part["test"], whole["train"], whole["test"]}) == 4
    from common.data import open_captions

    train, _ = open_captions("scenes:size=smoke")
    kept, scored = hold_out(train, 0.25)
    assert set(kept.ids).isdisjoint(scored.ids) and {*kept.ids, *scored.ids} == set(train.ids)
    for share in (0.0, 1.0, 1e-9):
        with pytest.raises(UserError, match="--val-share"):
            hold_out(train, share)


# one real cell, through the command


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A grid of one smoke cell run by the command, from a TOML file."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "grid.toml").write_text(
        'recipe = "smoke"\ntasks = ["wsol"]\nout = "results"\n[backbones]\nmine = "scratch:resnet18_half"\n'
    )
    done = backbench("run", folder / "grid.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def backbench(*words, **more):
    command = [sys.executable, "-m", "common.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **more)


def test_a_grid_of_toml_checks_runs_and_ends_with_the_board(real):
    folder, printed = real
    for part in (
        "data: wsol scenes",
        "weights: scratch:",
        "disk: up to",
        "time: unknown",
        "1 cells computed",
        "CAM",
    ):
        assert part in printed
    (cell,) = load_cells(folder)
    assert (cell.identity.backbone, cell.identity.group) == ("mine", "mine")
    again = backbench("run", folder / "grid.toml")
    assert again.returncode == 0 and "0 cells computed, 1 finished before" in again.stdout
    for target in (folder / "grid.toml", folder / "results"):
        status = backbench("status", target)
        assert status.returncode == 0 and status.stdout.startswith(("1 cells: 1 done", "code drifted")), (
            status
        )


def test_rerun_reproduces_the_cell_exactly(real):
    folder, _ = real
    before = file_digest(next(folder.rglob("cell.json")))
    done = backbench("rerun", "wsol/cam/mine/seed0", "--results", folder / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("reproduced exactly") and "Top-1 Loc" in done.stdout
    assert "images.npz: the same bytes" in done.stdout
    assert file_digest(next(folder.rglob("cell.json"))) == before
    for words, message in ((["wsol/cam/none/seed0"], "no such cell"), ([], "the following arguments")):
        wrong = backbench("rerun", *words, "--results", folder / "results")
        assert wrong.returncode == 2 and message in wrong.stderr


def test_rerun_shows_a_difference_and_refuses_what_is_not_unique(real, tmp_path):
    folder, _ = real
    (cell,) = load_cells(folder)
    old = json.loads((cell.folder / "cell.json").read_text())
    new = json.loads(json.dumps(old))
    new["metrics"]["Top-1 Loc"] += 0.25
    lines, equal = rerun.compare(old, new)
    assert (
        not equal and any(line.split()[-1] == "25" for line in lines) and lines[-1] == "not the same numbers"
    )
    for name in ("a", "b"):
        shutil.copytree(cell.folder, tmp_path / name / "seed0")
    with pytest.raises(UserError, match="names 2 cells"):
        rerun.find_cell("cam/mine/seed0", tmp_path)
    (tmp_path / "a" / "seed0" / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match="does not say by which command"):
        rerun.rerun_cell(tmp_path / "a" / "seed0")


def test_results_copied_from_another_machine_are_done_there(real, tmp_path):
    folder, _ = real
    shutil.copytree(folder / "results" / "scenes-smoke", tmp_path / "results" / "scenes-smoke")
    shutil.copy(folder / "grid.toml", tmp_path)
    status = backbench("status", tmp_path / "grid.toml")
    assert status.stdout.splitlines()[-1].startswith("1 cells: 1 done"), status


# the cell's schema

EXAMPLES = sorted((Path(__file__).parent / "cells").glob("*/cell.json"))


def problems(value, schema, where="cell") -> list[str]:
    """What of a JSON value breaks a schema, of the few words that ours uses."""
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
    }
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = [
        number if w == "number" else isinstance(value, types[w]) and (w != "integer" or number)
        for w in wanted
    ]
    if wanted and not any(fits):
        return [f"{where}: {value!r} is no {wanted}"]
    found = [f"{where}: {value!r} is not {schema['const']}"] if value != schema.get("const", value) else []
    if isinstance(value, dict):
        found += [f"{where}: no {key}" for key in schema.get("required", []) if key not in value]
        rest = schema.get("additionalProperties", True)
        for key, inner in value.items():
            inner_schema = schema.get("properties", {}).get(key, rest)
            if inner_schema is False:
                found.append(f"{where}: {key} is unknown")
            elif isinstance(inner_schema, dict):
                found += problems(inner, inner_schema, f"{where}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        found += [p for n, item in enumerate(value) for p in problems(item, schema["items"], f"{where}[{n}]")]
    return found


def schema():
    return json.loads((ROOT / "common" / "board" / "cell.schema.json").read_text())


def test_a_new_cell_follows_the_schema_file(real):
    folder, _ = real
    cell = json.loads(next(folder.rglob("cell.json")).read_text())
    assert problems(cell, schema()) == []
    assert problems({**cell, "metrics": {"a": "b"}}, schema()) == [
        "cell.metrics.a: 'b' is no ['number', 'null']",
    ]
    del cell["identity"]["seed"]
    assert problems(cell, schema()) == ["cell.identity: no seed"]


def test_frozen_cells_stay_readable():
    """Cells of every schema version that was ever written, as they were written; never change these files."""
    from common.metrics import rescore

    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        assert problems(json.loads(path.read_text()), schema()) == []
        (cell,) = load_cells(path.parent)
        again = rescore(cell.identity.task, cell.images())
        for name, value in cell.metrics.items():
            assert value is None or again[name][0] == pytest.approx(value, abs=1e-12)
