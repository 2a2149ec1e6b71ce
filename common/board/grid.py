"""The grid: cells as command lines, run one after the other; a finished one is recognised without starting it.

`common` never imports a task: a cell is `python -m detection.finetune …` in a process of its own, so that one that
fails or dies takes nothing with it. Each job leaves a stamp of all it depends on (command, code, data, backbone
file); a job whose stamp is unchanged and whose cell is there is done.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.cell import ROOT, code_hash
from common.data import open_captions, open_classification, open_detection, open_localisation
from common.errors import UserError
from common.files import digest, file_digest, make_folder, read_json, write_json

# task name → (module, further arguments, the reader of its data)
TASKS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "ssd300": ("detection.finetune", ("--detector", "ssd300"), "detection"),
    "faster_rcnn": ("detection.finetune", ("--detector", "faster_rcnn"), "detection"),
    "captioning": ("captioning.finetune", (), "captioning"),
    "wsol": ("wsol.finetune", (), "wsol"),
}
ROOMS = {"detection": ("ssd300", "faster_rcnn"), "captioning": ("captioning",), "wsol": ("wsol",)}
READERS: dict[str, Callable] = {
    "classification": open_classification,
    "detection": open_detection,
    "captioning": open_captions,
    "wsol": open_localisation,
}


@dataclass(frozen=True)
class Job:
    """One cell to compute: its name, command, room, data and the backbone file it needs (None: none)."""

    name: str
    command: tuple[str, ...]
    room: str
    data: str
    backbone: Path | None = None
    limit: int = 0

    def stamp(self) -> str:
        """A digest of everything the job depends on. Raises UserError when its data or backbone is not there."""
        sets = READERS[self.room](self.data, self.limit or None)
        weights = file_digest(self.backbone) if self.backbone else None
        return digest(self.command, code_hash(self.room), [s.fingerprint for s in sets], weights)


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
    more: list[str],
) -> list[Job]:
    """One job a backbone, task and seed. `backbones` are `[name=]SPEC`; `data` maps rooms to data specs.

    Raises UserError for an unknown task or a backbone file that is not there.
    """
    jobs = []
    for seed in seeds:
        for task in tasks:
            module, arguments, room = TASKS[task]
            for text in backbones:
                name, spec = split_backbone(text)
                file = Path(spec).expanduser().absolute() if is_file(spec) else None
                command = [
                    module,
                    *arguments,
                    "--backbone",
                    str(file or spec),
                    "--recipe",
                    recipe,
                    "--seed",
                    str(seed),
                ]
                command += [
                    "--data",
                    data[room],
                    "--out",
                    str(out),
                    *(["--name", name] if name else []),
                    *more,
                ]
                label = f"{task}/{name or Path(spec).stem}/seed{seed}"
                jobs.append(Job(label, tuple(command), room, data[room], file))
    return jobs


def split_backbone(text: str) -> tuple[str, str]:
    """`name=SPEC` or SPEC → (name or "", SPEC)."""
    name, equals, spec = text.partition("=")
    return (name, spec) if equals else ("", text)


def is_file(spec: str) -> bool:
    """Whether a backbone spec names a file, not a library's model or random weights."""
    return spec.partition(":")[0] not in ("torchvision", "timm", "scratch")


def expand_tasks(names: list[str]) -> list[str]:
    """`all`, rooms (detection) and tasks (ssd300) → tasks, each once. Raises UserError for any other name."""
    found: list[str] = []
    for name in names:
        if name != "all" and name not in ROOMS and name not in TASKS:
            raise UserError(f"--tasks {name}: unknown; use all, {', '.join(ROOMS)} or {', '.join(TASKS)}")
        found += TASKS if name == "all" else ROOMS.get(name, (name,))
    return list(dict.fromkeys(found))


def run_jobs(jobs: list[Job], records: Path) -> list[Outcome]:
    """Run the jobs that are not done, in order, in this terminal; a failing one never stops the others.

    `records` is the folder of the stamps. A job whose backbone file a failed job should have written fails too.
    """
    make_folder(records)
    outcomes: list[Outcome] = []
    start = time.monotonic()
    for number, job in enumerate(jobs, 1):
        record = records / (job.name.replace("/", "~") + ".json")
        head = f"cell {number} of {len(jobs)}: {job.name}"
        if job.backbone and not job.backbone.exists():
            print(f"{head}: failed, its backbone {job.backbone} is not there", flush=True)
            outcomes.append(Outcome(job, "failed", 0.0))
            continue
        stamp = job.stamp()
        if is_done(record, stamp):
            outcomes.append(Outcome(job, "done before", 0.0))
            continue
        ran = [o for o in outcomes if o.state == "done"]
        left = sum(_expected(other, ran) for other in jobs[number - 1 :])
        clock = f"{_minutes(time.monotonic() - start)} gone" + (
            f", about {_minutes(left)} left" if left else ""
        )
        print(f"{head} ({clock})", flush=True)
        began = time.monotonic()
        code = run_command(job.command, record)
        ok = code == 0 and _finish_record(record, stamp)
        if not ok:
            print(f"{head}: failed with exit code {code}; run again to try it again", flush=True)
        outcomes.append(Outcome(job, "done" if ok else "failed", time.monotonic() - began))
        if code in (75, 130) or (code < 0 and -code in (signal.SIGINT, signal.SIGTERM)):
            raise SystemExit(75)  # the user or a scheduler stopped the cell: stop here, to be continued
    return outcomes


def is_done(record: Path, stamp: str) -> bool:
    """Whether a job's record holds this stamp and its cell is still there."""
    if not record.exists():
        return False
    entry = read_json(record)
    return entry.get("stamp") == stamp and (Path(entry["folder"]) / "cell.json").exists()


def _finish_record(record: Path, stamp: str) -> bool:
    """Complete the record that the job's process wrote with its folder; whether its cell is there."""
    if not record.exists():
        return False
    entry = read_json(record)
    write_json(record, {**entry, "stamp": stamp})
    return (Path(entry["folder"]) / "cell.json").exists()


def run_command(command: tuple[str, ...], record: Path) -> int:
    """Run `python -m command` here; it dies with this process. It writes its folder into `record`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "BACKBENCH_RECORD": str(record)}
    record.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", *command], env=env, preexec_fn=_die_with_parent)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise


def _die_with_parent() -> None:
    """In the child: be killed when the parent dies, or a killed grid would leave a cell at work behind it (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _expected(job: Job, ran: list[Outcome]) -> float:
    """Seconds a job may take: the mean of those like it that ran, else of all."""
    kind = job.name.split("/")[0]
    like = [o.seconds for o in ran if o.job.name.split("/")[0] == kind] or [o.seconds for o in ran]
    return sum(like) / len(like) if like else 0.0


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
