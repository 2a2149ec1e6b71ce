"""Kill a training anywhere, run the same command again at once: it goes on, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backbench.common.base.errors import Interrupted
from backbench.common.engine import read_log
from backbench.common.engine.loader import watched

ROOT = Path(__file__).resolve().parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the system ends children with their parent")
TRAIN = (
    *("pretrain/run.py", "--recipe", "smoke", "--set", "epochs=0", "--set", "iterations=1000000"),
    *("--set", "save_every=0", "--set", "log_every=2", "--workers", "2"),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
PROCESS = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
import backbench.common
import torch
from backbench.common.run.cell import PATIENCE
from backbench.common.engine import is_main, pick_device, train
from backbench.common.base.errors import run_main
from backbench.common.base.locks import lock
from backbench.common.base.recipe import Recipe

class Points:
    def __len__(self):
        return 64
    def batch(self, indices, rngs):
        return {{"x": torch.tensor(indices).float()[:, None], "ids": indices}}

def step(model, batch, rng):
    return {{"loss": model(batch["x"]).square().mean()}}

def main():
    device, folder = pick_device("cpu"), Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    held = lock(folder / ".lock", PATIENCE) if is_main() else None
    recipe = Recipe(iterations=10**6, batch=8, micro_batch=4, lr=1e-9, save_every=0, log_every=2, precision="fp32")
    train(torch.nn.Linear(1, 1), step, Points(), recipe, folder=folder, key="k", seed=1, device=device, workers=1)

run_main(main)
"""


def start(*command: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **streams)


def until(ready, process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait until `ready()`; fails when the process ends before it."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """All processes below one."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in file.read_text().split()] if file.exists() else []
    return [pid for child in found for pid in (child, *children(child))]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def iterations(out: Path) -> int:
    return max((line["iteration"] for line in read_log(out)), default=0)


def kill_and_run_again(out: Path, processes: int, *command: str) -> None:
    """Twice: start, wait for the work to go on, kill the one that was started; then nobody is at work."""
    left: list[int] = []
    for _ in range(2):
        before = iterations(out)
        process = start(*command)
        until(lambda: (out / "resume.pt").exists() and iterations(out) > before + 4, process)  # noqa: B023
        left = children(process.pid)
        assert len(left) >= processes
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 60
    while any(map(is_alive, left)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, left))


@LINUX
def test_a_training_is_killed_and_run_again_at_once(tmp_path):
    kill_and_run_again(tmp_path, 2, *TRAIN, "--out", str(tmp_path))


@LINUX
def test_torchrun_is_killed_and_run_again_at_once(tmp_path):
    (tmp_path / "script.py").write_text(PROCESS.format(root=str(ROOT)))
    kill_and_run_again(tmp_path / "run", 4, *TORCHRUN, str(tmp_path / "script.py"), str(tmp_path / "run"))


@LINUX
def test_a_killed_loader_process_is_one_line_and_may_be_tried_again(tmp_path):
    process = start(*TRAIN, "--out", str(tmp_path))
    until(lambda: iterations(tmp_path) > 2, process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    last = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 75
    assert (
        last.startswith("error: a loader process (pid ") and "run the same command again to continue" in last
    )


def test_a_killed_loader_is_told_though_another_error_hides_it():
    """torch raises in the middle of whatever runs; saving then fails for a reason of its own."""
    killed = "DataLoader worker (pid 12) is killed by signal: Killed. "
    with pytest.raises(Interrupted, match="a loader process \\(pid 12\\) was ended \\(Killed"), watched():
        try:
            raise RuntimeError(killed)
        except RuntimeError:
            raise OSError("unexpected position in the file")  # noqa: B904
