"""The SLURM executor on a real SLURM: one node on the loopback address, started by tests/slurm/start.sh.

Skipped where Debian's slurmctld, slurmd and munge (and root) are not to be had; with BACKBENCH_CI=1 that
is a failure, so a machine that is meant to run this cannot leave it out unseen.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, wait_until

from backbench.common.base.errors import UserError
from backbench.common.grid import slurm
from backbench.common.grid.facts import Facts
from backbench.common.grid.local import run_jobs
from backbench.common.grid.plan import Backbone, Grid, Job, plan_tasks
from backbench.common.grid.plan_file import jobs_to_json
from backbench.common.grid.records import read_record
from backbench.common.grid.status import look_at
from backbench.common.run.keys import ROOT

TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol")
DRIVER = """
import json, sys
from pathlib import Path
from backbench.common.grid import slurm
from backbench.common.grid.local import has_cell
from backbench.common.grid.plan_file import jobs_of_json

jobs, records, parameters = json.loads(Path(sys.argv[1]).read_text())
outcomes = slurm.run_slurm(jobs_of_json(jobs), Path(records), parameters, has_cell)
print(json.dumps({o.job.name: o.state for o in outcomes}))
"""


def missing() -> str:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "starting SLURM needs root"
    try:
        import submitit  # noqa: F401
    except ImportError:
        return "no submitit (pip install 'backbench[slurm]')"
    return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running SLURM of one node; SLURM_CONF is set while it runs."""
    if why := missing():
        if os.environ.get("BACKBENCH_CI") == "1":
            pytest.fail(f"SLURM is needed here: {why}")
        pytest.skip(why)
    folder = Path("/tmp") / f"backbench-slurm-{os.getpid()}"  # munge wants parents that others may enter
    scripts = Path(__file__).parent / "slurm"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
        try:
            started = subprocess.run(
                ["bash", scripts / "start.sh", folder], capture_output=True, text=True, timeout=120
            )
            assert started.returncode == 0, started.stdout + started.stderr
            patch.setenv("SLURM_CONF", started.stdout.split()[-1])
            yield folder
        finally:
            subprocess.run(["bash", scripts / "stop.sh", folder], check=False)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submitted():
    """Starts the executor in a process of its own, ended with the test."""
    running = []

    def start(jobs: list[Job], folder: Path, **parameters) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "call.json").write_text(json.dumps([jobs_to_json(jobs), str(folder / "grid"), parameters]))
        command = [sys.executable, "-c", DRIVER, str(folder / "call.json")]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path}
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def states(printed: str) -> dict[str, str]:
    return json.loads(printed.splitlines()[-1])


def test_a_preempted_cell_resumes_to_the_numbers_of_an_undisturbed_local_run(cluster, submitted, tmp_path):
    facts = Facts()
    made = {}
    for place in ("slurm", "local"):
        grid = Grid(recipe="smoke", out=tmp_path / place)
        backbone = Backbone("scratch:resnet18_half", label="scratch")
        (made[place],) = plan_tasks(grid, [backbone], ["wsol"], facts, ("iterations=60", "log_every=2"))
    job, records = made["slurm"], tmp_path / "slurm" / "grid"
    executor = submitted([job], tmp_path / "slurm", cpus_per_task=1)
    log = job.folder / "log.jsonl"
    lines = wait_until(lambda: log.exists() and log.read_text().splitlines())
    number = read_record(records, job)["slurm"]
    assert look_at([job], records, facts)[0].state == "running"
    subprocess.run(["scontrol", "requeue", number], check=True)
    wait_until(lambda: read_record(records, job).get("restarts") == 1)
    printed, _ = executor.communicate(timeout=PATIENCE)
    assert executor.returncode == 0 and states(printed) == {job.name: "done"}
    assert 0 < len(lines) < 25  # of 30: it was in the middle
    record = read_record(records, job)
    assert (record["state"], record["restarts"], record["slurm"]) == ("done", 1, number)
    (outcome,) = run_jobs([made["local"]], tmp_path / "local" / "grid", slots=os.cpu_count() or 1)
    assert outcome.state == "done"
    cells = [json.loads((j.folder / "cell.json").read_text()) for j in made.values()]
    assert cells[0]["keys"] == cells[1]["keys"] and cells[0]["metrics"] == cells[1]["metrics"]
    assert cells[0]["device"] == cells[1]["device"]  # the number of threads too
    for name in ("images.npz", "scoremaps.npz"):
        assert cells[0]["files"][name] == cells[1]["files"][name], name
        assert (made["slurm"].folder / name).read_bytes() == (made["local"].folder / name).read_bytes()


FAKE = """
import os, signal, sys, time
from pathlib import Path

how, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "tries").open("a") as tries:
    tries.write("x")
if how == "user":
    sys.exit(2)
if how == "dies_once" and (folder / "tries").read_text() == "x":
    os.kill(os.getpid(), signal.SIGSEGV)
if how == "waits":
    while not (folder.parent / "go").exists():
        time.sleep(0.1)
if how == "saves" and (folder / "tries").read_text() == "x":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
    (folder / "ready").touch()
    while True:
        time.sleep(300)
if how == "writes":
    (folder / "made.pt").touch()
(folder / "cell.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes jobs of a task that does what it is told; see FAKE."""
    (tmp_path / "backbench" / "faketask").mkdir(parents=True)
    (tmp_path / "backbench" / "faketask" / "cell.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name, how, **more):
        folder = tmp_path / "out" / name
        return Job(name, ("faketask.cell", how, str(folder)), "wsol", folder, **more)

    return make


def test_the_warning_before_a_time_limit_saves_and_requeues_the_cell(cluster, submitted, fake, tmp_path):
    """submitit asks SLURM for SIGUSR2 to the whole step; here it is sent by hand, for limits are of minutes."""
    job, records = fake("long", "saves"), tmp_path / "grid"
    executor = submitted([job], tmp_path)
    wait_until((job.folder / "ready").exists)
    subprocess.run(["scancel", "--signal=USR2", read_record(records, job)["slurm"]], check=True)
    printed, _ = executor.communicate(timeout=PATIENCE)
    assert states(printed) == {"long": "done"} and (job.folder / "saved").exists()
    assert (job.folder / "tries").read_text() == "xx" and read_record(records, job)["restarts"] == 1


def test_an_array_of_cells_waits_fails_and_retries_as_the_local_executor_does(
    cluster, submitted, fake, tmp_path
):
    pre = fake("pre", "writes", writes=tmp_path / "out" / "pre" / "made.pt")
    jobs = [
        pre,
        fake("user", "user"),
        fake("dies_once", "dies_once"),
        fake("waits", "waits"),
        fake("uses", "fine", backbone=str(pre.writes), needs="pre"),
        fake("lost", "fine", backbone=str(tmp_path / "never.pt"), needs="user"),
    ]
    first = submitted(jobs, tmp_path)
    wait_until(lambda: (tmp_path / "out" / "waits" / "tries").exists())
    first.kill()  # the scheduler dies; its SLURM jobs go on
    first.communicate()
    again = submitted(jobs, tmp_path)
    time.sleep(2)
    (tmp_path / "out" / "go").touch()
    printed, _ = again.communicate(timeout=PATIENCE)
    expected = {
        **dict.fromkeys(("pre", "dies_once", "waits", "uses"), "done"),
        "user": "failed",
        "lost": "failed",
    }
    found = states(printed)
    assert {name: state.removesuffix(" before") for name, state in found.items()} == expected
    assert (tmp_path / "out" / "waits" / "tries").read_text() == "x"  # waited for, not submitted again
    assert (tmp_path / "out" / "dies_once" / "tries").read_text() == "xx"


def test_what_slurm_refuses_is_one_line(cluster, tmp_path):
    job = Job("a", ("faketask.cell",), "wsol", tmp_path)
    with pytest.raises(UserError, match="sbatch refused"):
        slurm.run_slurm([job], tmp_path / "grid", {"partition": "nowhere"}, lambda job: False)
    with pytest.raises(UserError, match="--slurm"):
        slurm.make_executor(tmp_path, {"nonsense": 1})
    with pytest.raises(UserError, match="gpus_per_node=4: a cell is one process on one GPU"):
        slurm.make_executor(tmp_path, {"gpus_per_node": 4})


def test_without_slurm_the_executor_says_so(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--executor slurm: .*sbatch and srun"):
        slurm.make_executor(tmp_path, {})
    with pytest.raises(UserError, match="squeue does not answer"):
        slurm.slurm_queue()
