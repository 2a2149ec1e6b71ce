"""The local executor with fake cells: what runs beside what, what is tried again, what a death leaves."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import PATIENCE, wait_until

from backbench.common.grid.local import places, run_jobs, visible_gpus
from backbench.common.grid.plan import Job
from backbench.common.grid.plan_file import jobs_to_json
from backbench.common.grid.records import may_retry, read_record
from backbench.common.run.keys import ROOT

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
    while True:
        time.sleep(60)
if how == "meets":  # two at a time: leaves the GPUs of both
    mine = os.environ["CUDA_VISIBLE_DEVICES"]
    (folder / "here").write_text(mine)
    beside = folder.parent / str(int(folder.name) ^ 1) / "here"
    while not (beside.exists() and beside.read_text()):
        time.sleep(0.02)
    (folder / "beside").write_text(" ".join(sorted([mine, beside.read_text()])))
if how == "alone":
    found = [name for name in os.environ if name.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_", "TORCHEL"))]
    if found:
        sys.exit(f"not alone: {found}")
if how == "writes":
    (folder / "made.pt").touch()
if how != "empty":
    (folder / "cell.json").write_text("{}")
"""


@pytest.fixture(autouse=True)
def forget_gpus():
    visible_gpus.cache_clear()
    yield
    visible_gpus.cache_clear()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A maker of jobs that run a fake task: fake(name, how, …)."""
    (tmp_path / "backbench" / "faketask").mkdir(parents=True)
    (tmp_path / "backbench" / "faketask" / "cell.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def make(name, how="fine", **more):
        folder = tmp_path / "out" / name
        return Job(name, ("faketask.cell", how, str(folder)), "wsol", folder, **more)

    return make


def test_a_cell_is_alone_though_the_grid_has_the_environment_of_a_torchrun(tmp_path, fake, monkeypatch):
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
    ):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "10.255.255.1")
    assert states(run_jobs([fake("a/alone", "alone")], tmp_path / "grid")) == {"a/alone": "done"}


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


SMI = """GPU 0: NVIDIA H100 (UUID: GPU-aa)
GPU 1: NVIDIA A100 (UUID: GPU-bb)
  MIG 3g.20gb     Device  0: (UUID: MIG-cc)
  MIG 3g.20gb     Device  1: (UUID: MIG-dd)
"""


@pytest.mark.parametrize(
    "chosen, found",
    [
        ("2", ["2"]),
        ("GPU-aa, MIG-bb/1/0", ["GPU-aa", "MIG-bb/1/0"]),
        ("1,-1,0", ["1"]),
        ("NoDevFiles", []),
        ("", []),
        (None, ["0", "MIG-cc", "MIG-dd"]),
    ],
)
def test_the_gpus_that_cells_may_use(fake, tmp_path, monkeypatch, chosen, found):
    """Those the user lets be seen, else all that nvidia-smi lists, a split one by its parts."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<END\n{SMI}END\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert list(visible_gpus()) == found


def test_cells_that_run_together_each_see_one_gpu_alone(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,MIG-bb")
    jobs = [fake(f"a/{n}", "meets") for n in range(4)]
    assert set(states(run_jobs(jobs, tmp_path / "grid")).values()) == {"done"}
    seen = [log.read_text().split("gpu ")[1].split()[0] for log in (tmp_path / "grid").glob("*.log")]
    assert sorted(seen) == ["GPU-aa", "GPU-aa", "MIG-bb", "MIG-bb"]
    pairs = [(folder / "beside").read_text() for folder in (job.folder for job in jobs)]
    assert set(pairs) == {"GPU-aa MIG-bb"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_grid_that_dies_leaves_no_cell_behind_and_goes_on(fake, tmp_path, number):
    job = fake("a/sleeps", "sleeps")
    script = (
        "import json, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from backbench.common.grid.local import run_jobs; from backbench.common.grid.plan_file import jobs_of_json\n"
        f"run_jobs(jobs_of_json(json.loads({json.dumps(json.dumps(jobs_to_json([job])))})), Path({str(tmp_path)!r}))"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            wait_until((job.folder / "asleep").exists, process)
            record = wait_until(
                lambda: (r := read_record(tmp_path, job)).get("state") == "running" and r, process
            )
            process.send_signal(number)
            process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -9, signal.SIGINT: -2}[number] or (
        number == signal.SIGINT and process.returncode in (1, 130)
    )
    assert (job.folder / "saved").exists() == (number != signal.SIGKILL)  # asked to save, where one could ask
    wait_until(lambda: not is_alive(record["pid"]))
    going_on = replace(job, command=(job.command[0], "fine", job.command[2]))
    assert states(run_jobs([going_on], tmp_path)) == {"a/sleeps": "done"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
