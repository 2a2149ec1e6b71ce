"""The local executor: cells as processes, a few at a time; one that fails or dies takes nothing with it.

`common` never imports a task: a cell is `python -m detection.finetune …` in a process of its own.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbench.common.base.files import make_folder
from backbench.common.grid.display import Display, last_lines
from backbench.common.grid.facts import child_env, python_command
from backbench.common.grid.plan import Job
from backbench.common.grid.records import (
    REQUEUE,
    describe_exit,
    may_retry,
    record_file,
    threads_of,
    write_record,
)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `state` is "done", "done before" or "failed"."""

    job: Job
    state: str
    seconds: float


@dataclass(frozen=True)
class Running:
    """A cell at work."""

    job: Job
    process: subprocess.Popen
    log: Path
    began: float
    place: dict[str, str]


def run_jobs(
    jobs: list[Job], records: Path, *, slots: int = 1, is_done: Callable[[Job], bool] | None = None
) -> list[Outcome]:
    """Run the jobs that are not done, `slots` at a time (on each GPU, where there are some).

    A failing cell never stops the others; one that was killed or stopped is tried once more, behind all others, and
    resumes. A job waits for the job that writes its backbone file, and fails with it. Stopped by Ctrl-C, SIGTERM or
    SIGUSR1, the cells save their state, and the same call goes on.
    """
    make_folder(records)
    is_done = is_done or has_cell
    free = places(slots)
    waiting, running, outcomes, tries = list(jobs), [], [], dict.fromkeys((job.name for job in jobs), 0)
    with Display(len(jobs), len(free)) as display, _stopped_by_signals():
        try:
            while waiting or running:
                for cell in [cell for cell in running if cell.process.poll() is not None]:
                    running.remove(cell)
                    free.append(cell.place)
                    if _tried_again(cell, tries, display):
                        waiting.append(replace(cell.job, restart=False))
                    else:
                        outcomes.append(_ended(cell, records, tries[cell.job.name], display))
                for job in _startable(waiting, running):
                    if not free:
                        break
                    waiting.remove(job)
                    outcome = _ended_before(job, records, tries, is_done, display)
                    if outcome:
                        outcomes.append(outcome)
                        break  # what waited for this one may go now
                    tries[job.name] += 1
                    number = len(jobs) - len(waiting)
                    display.line(f"cell {number} of {len(jobs)}: {job.name}")
                    running.append(start(job, records, free.pop(0)))
                display.show(outcomes, [(cell.job.name, cell.log) for cell in running], jobs)
                time.sleep(0.05)
        except BaseException:
            _stop(running)
            raise
    order = {job.name: number for number, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.job.name])


def has_cell(job: Job) -> bool:
    """Whether a job's cell, and the backbone file it writes, are there."""
    return (job.folder / "cell.json").exists() and (job.writes is None or job.writes.exists())


def places(slots: int) -> list[dict[str, str]]:
    """What distinguishes the cells that run together: `slots` a GPU, or `slots` that share the cores.

    A cell is one process on one GPU, and sees no other.
    """
    gpus = visible_gpus()
    every = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(slots) for gpu in gpus] or [
        {} for _ in range(slots)
    ]
    return [{**place, "OMP_NUM_THREADS": str(threads_of(len(every)))} for place in every]


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """The GPUs cells may use, each as CUDA_VISIBLE_DEVICES names it: those of that variable, else all there are.

    A name that CUDA does not know (-1, NoDevFiles) hides itself and all behind it, as it does from CUDA.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        return tuple(itertools.takewhile(re.compile(r"\d+$|GPU-|MIG-").match, names))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return listed_gpus(listed.stdout)


def listed_gpus(text: str) -> tuple[str, ...]:
    """The devices of `nvidia-smi -L`: a GPU by its number, one that is split (MIG) by the names of its parts."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith("GPU "):
            found.append([])
        elif found and (part := re.search(r"UUID: (MIG-[^)]+)", line)):
            found[-1].append(part[1])
    return tuple(name for number, parts in enumerate(found) for name in parts or [str(number)])


def start(job: Job, records: Path, place: dict[str, str], **facts: Any) -> Running:
    """Start `python -m` with the job's command; it dies with this process."""
    log = record_file(records, job).with_suffix(".log")
    command = python_command([*job.command, *(["--restart"] if job.restart else [])])
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=child_env(BACKBENCH_BAR_SECONDS="1", **place),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the grid alone, which asks its cells to save
            preexec_fn=_in_child,
        )
    write_record(records, job, "running", pid=process.pid, **facts)
    return Running(job, process, log, time.monotonic(), place)


def _startable(waiting: list[Job], running: list[Running]) -> list[Job]:
    busy = {cell.job.name for cell in running} | {job.name for job in waiting}
    return [job for job in waiting if job.needs not in busy]


def _ended_before(
    job: Job, records: Path, tries: dict[str, int], is_done: Callable[[Job], bool], display: Display
) -> Outcome | None:
    """The outcome of a job that need not, or cannot, be started."""
    if not job.ready():
        write_record(records, job, "failed", why=f"its backbone {job.backbone} is not there")
        display.line(f"{job.name}: its backbone {job.backbone} is not there")
        return Outcome(job, "failed", 0.0)
    if not job.restart and not tries[job.name] and is_done(job):
        return Outcome(job, "done before", 0.0)
    return None


def _tried_again(cell: Running, tries: dict[str, int], display: Display) -> bool:
    code = cell.process.returncode
    if not may_retry(code) or tries[cell.job.name] > 1:
        return False
    what = "stopped, its state saved" if code == REQUEUE else describe_exit(code)
    display.line(f"{cell.job.name}: {what}; it goes on behind the others")
    return True


def _ended(cell: Running, records: Path, tries: int, display: Display) -> Outcome:
    """Record and say how a cell ended."""
    job, seconds, code = cell.job, time.monotonic() - cell.began, cell.process.returncode
    if code == 0 and has_cell(job):
        write_record(records, job, "done", seconds=round(seconds, 2), tries=tries)
        display.line(f"{job.name}: {last_lines(cell.log, 1)} ({seconds:.0f} s)")
        return Outcome(job, "done", seconds)
    why = describe_exit(code) if code else f"it ended well, but left no cell in {job.folder}"
    write_record(records, job, "failed", why=why, code=code, seconds=round(seconds, 2), tries=tries)
    display.line(f"{job.name}: failed: {why}: {last_lines(cell.log, 1)} (log: {cell.log})")
    return Outcome(job, "failed", seconds)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 end the grid as they end a cell: saved, exit code 75, to be continued."""

    def stop(number: int, frame: Any) -> None:
        print("stopped by a signal: the cells save; run the same command again to continue", file=sys.stderr)
        raise SystemExit(REQUEUE)

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGUSR1)}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(running: list[Running], patience: float = 120.0) -> None:
    """Ask cells to save their state and end; kill what does not."""
    for cell in running:
        cell.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + patience
    for cell in running:
        try:
            cell.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            cell.process.kill()
            cell.process.wait()


def _in_child() -> None:
    """Be killed when the parent dies, or a killed grid would leave a cell at work behind it (Linux); ignore SIGUSR2.

    That is SLURM's warning before a time limit, given to every process of a job: the parent asks the cell to save.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
