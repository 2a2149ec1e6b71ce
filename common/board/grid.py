"""The grid: cells as command lines, a few at a time; a finished one is recognised without starting it.

`common` never imports a task: a cell is `python -m detection.finetune …` in a process of its own, so that one that
fails or dies takes nothing with it. Each job leaves a stamp of all it depends on (command, code, data, backbone
file); a job whose stamp is unchanged and whose cell is there is done.
"""

import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import common.data
from common.board.display import Display, last_lines
from common.board.tasks import READERS, TASKS
from common.cell import ROOT, code_hash
from common.engine import REQUEUE
from common.files import digest, file_digest, make_folder, read_json, write_json


@dataclass(frozen=True)
class Job:
    """One cell to compute: its name, command, room, data and the backbone file it needs (None: none)."""

    name: str
    command: tuple[str, ...]
    room: str
    data: str
    backbone: Path | None = None
    needs: str = ""  # the name of the job that writes `backbone`
    limit: int = 0

    def stamp(self) -> str:
        """A digest of everything the job depends on. Raises UserError when its data or backbone is not there."""
        weights = file_digest(self.backbone) if self.backbone else None
        return digest(
            self.command, code_hash(self.room), fingerprints(self.room, self.data, self.limit), weights
        )


@functools.cache
def fingerprints(room: str, data: str, limit: int) -> list[str]:
    """Of a room's training and test data, read and checked once a process."""
    return [part.fingerprint for part in getattr(common.data, READERS[room])(data, limit or None)]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `state` is "done", "done before" or "failed"."""

    job: Job
    state: str
    seconds: float


def plan_tasks(
    backbones: list[str],
    tasks: list[str],
    data: dict[str, str],
    seeds: list[int],
    recipe: str,
    out: Path,
    writers: dict[Path, str] | None = None,
) -> list[Job]:
    """One job a backbone, task and seed, all of the first backbone first.

    `backbones` are `[name=]SPEC`; `data` maps rooms to data specs, `writers` backbone files that do not exist yet to
    the names of the jobs that write them.
    """
    jobs = []
    for seed in seeds:
        for text in backbones:
            name, spec = split_backbone(text)
            file = Path(spec).expanduser().absolute() if is_file(spec) else None
            for task in tasks:
                module, arguments, room = TASKS[task].module, TASKS[task].arguments, TASKS[task].room
                command = (module, *arguments, "--backbone", str(file or spec), "--data", data[room])
                command += ("--recipe", recipe, "--seed", str(seed), "--out", str(out))
                command += ("--name", name) if name else ()
                label = name or (
                    file.stem if file else spec.partition(":")[0 if spec.startswith("scratch") else 2]
                )
                needs = (writers or {}).get(file, "")
                jobs.append(Job(f"{task}/{label}/seed{seed}", command, room, data[room], file, needs))
    return jobs


def split_backbone(text: str) -> tuple[str, str]:
    """`name=SPEC` or SPEC → (name or "", SPEC)."""
    name, equals, spec = text.partition("=")
    return (name, spec) if equals else ("", text)


def is_file(spec: str) -> bool:
    """Whether a backbone spec names a file, not a library's model or random weights."""
    return spec.partition(":")[0] not in ("torchvision", "timm", "scratch")


def run_jobs(jobs: list[Job], records: Path, slots: int = 1) -> list[Outcome]:
    """Run the jobs that are not done, `slots` at a time, the cores shared out; a failing one never stops the others.

    `records` is the folder of the stamps and logs. A job waits for the job that writes its backbone file, and fails
    with it. Stopped by Ctrl-C or SIGTERM, the cells save their state and the same call goes on.
    """
    make_folder(records)
    threads = max(1, (os.cpu_count() or 1) // slots)
    outcomes: list[Outcome] = []
    waiting, running = list(enumerate(jobs, 1)), []
    with Display(len(jobs), slots) as display:
        try:
            while waiting or running:
                for cell in [cell for cell in running if cell.process.poll() is not None]:
                    running.remove(cell)
                    outcomes.append(_finish(cell, display))
                    if cell.process.returncode == REQUEUE:
                        raise KeyboardInterrupt  # a scheduler stopped the cell: stop here, to be continued
                busy = {cell.job.name for cell in running} | {job.name for _, job in waiting}
                for number, job in list(waiting):
                    if job.needs in busy or len(running) == slots:
                        continue
                    waiting.remove((number, job))
                    record = records / (job.name.replace("/", "~") + ".json")
                    missing = job.backbone is not None and not job.backbone.exists()
                    stamp = "" if missing else job.stamp()
                    if missing or is_done(record, stamp):
                        outcomes.append(Outcome(job, "failed" if missing else "done before", 0.0))
                        display.line(
                            f"{job.name}: its backbone {job.backbone} is not there"
                        ) if missing else None
                        break  # what waited for this one may go now
                    display.line(f"cell {number} of {len(jobs)}: {job.name}")
                    running.append(start(job, record, stamp, threads))
                display.show(outcomes, [(cell.job.name, cell.log) for cell in running], jobs)
                time.sleep(0.05)
        except BaseException:
            for cell in running:
                cell.process.send_signal(signal.SIGTERM)
            for cell in running:
                cell.process.wait()
            raise
    order = {job.name: number for number, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.job.name])


@dataclass(frozen=True)
class Running:
    """A cell at work."""

    job: Job
    process: subprocess.Popen
    record: Path
    stamp: str
    log: Path
    began: float


def start(job: Job, record: Path, stamp: str, threads: int) -> Running:
    """Start `python -m` with the job's command; it dies with this process and writes its folder into `record`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "BACKBENCH_RECORD": str(record)}
    env |= {"OMP_NUM_THREADS": str(threads), "BACKBENCH_BAR_SECONDS": "1"}
    record.unlink(missing_ok=True)
    log = record.with_suffix(".log")
    with log.open("wb") as out:
        command = [sys.executable, "-u", "-m", *job.command]
        process = subprocess.Popen(
            command,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,
        )
    return Running(job, process, record, stamp, log, time.monotonic())


def _finish(cell: Running, display: Display) -> Outcome:
    """Complete the record that the cell's process wrote with its folder, and say how it ended."""
    seconds, code = time.monotonic() - cell.began, cell.process.returncode
    if code == 0 and cell.record.exists():
        entry = read_json(cell.record)
        if (Path(entry["folder"]) / "cell.json").exists():
            write_json(cell.record, {**entry, "stamp": cell.stamp})
            display.line(f"{cell.job.name}: {last_lines(cell.log, 1)} ({seconds:.0f} s)")
            return Outcome(cell.job, "done", seconds)
    display.line(
        f"{cell.job.name}: failed with exit code {code}: {last_lines(cell.log, 1)} (log: {cell.log})"
    )
    return Outcome(cell.job, "failed", seconds)


def is_done(record: Path, stamp: str) -> bool:
    """Whether a job's record holds this stamp and its cell is still there."""
    if not record.exists():
        return False
    entry = read_json(record)
    return entry.get("stamp") == stamp and (Path(entry["folder"]) / "cell.json").exists()


def _die_with_parent() -> None:
    """In the child: be killed when the parent dies, or a killed grid would leave a cell at work behind it (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
