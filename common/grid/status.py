"""What of a grid is done, and why the rest is not: each cell's keys against what they would be made of today."""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import STAGES
from backbench.common.grid.display import last_lines
from backbench.common.grid.facts import Facts
from backbench.common.grid.plan import Job, expected_inputs
from backbench.common.grid.records import at_work, read_record, record_file
from backbench.common.run.keys import differences, evaluated_in, stage_keys

STATES = ("done", "stale", "failed", "running", "queued", "to do")


@dataclass(frozen=True)
class Status:
    """One cell: its state (one of STATES), why, and whether other code than today's computed it.

    `stage`: of a stale cell, the first stage whose key changed.
    """

    job: Job
    state: str
    why: tuple[str, ...] = ()
    drifted: bool = False
    stage: str = ""


def look_at(jobs: Iterable[Job], records: Path, facts: Facts) -> list[Status]:
    """The state of every job. Reads cell.json, records and file times; changes nothing."""
    jobs = list(jobs)
    expected = _Expected(facts)
    queue = slurm_queue() if any(read_record(records, job).get("slurm") for job in jobs) else {}
    locked = locked_inodes()
    return [_look(job, records, expected, queue, locked) for job in jobs]


class _Expected:
    """Expected inputs and keys: what cells share (data, recipe, weights) is asked once."""

    def __init__(self, facts: Facts) -> None:
        self.facts, self.found = facts, {}

    def inputs(self, job: Job) -> dict[str, Any]:
        shared = (job.room, job.model, job.data, job.recipe, job.backbone, job.limit, job.val_share)
        if shared not in self.found:
            self.found[shared] = expected_inputs(job, self.facts)
        inputs = self.found[shared]
        return {**inputs, "train": {**inputs["train"], "seed": job.seed}}

    def code(self, room: str) -> str:
        if room not in self.found:
            self.found[room] = self.facts.code(room)
        return self.found[room]


def _look(job: Job, records: Path, expected: _Expected, queue: dict[str, str], locked: set[int]) -> Status:
    record = read_record(records, job)
    if (
        Path(record.get("folder", job.folder)).resolve() != job.folder.resolve()
    ):  # of the folder this is a copy of
        record = {} if record.get("state") in ("queued", "running") else record
    if _is_locked(job.folder, locked) or at_work(record, job):
        return Status(job, "running", _progress(job.folder))
    if record.get("state") in ("queued", "running") and record.get("slurm") in queue:
        state = "running" if queue[record["slurm"]] == "RUNNING" else "queued"
        return Status(job, state, (f"SLURM job {record['slurm']}: {queue[record['slurm']]}",))
    cell = _cell(job.folder)
    if cell is not None and (job.writes is None or job.writes.exists()):
        return _finished(job, cell, expected)
    if record.get("state") == "failed":
        log = record_file(records, job).with_suffix(".log")
        lines = last_lines(log, 3).splitlines() if log.exists() else []
        return Status(job, "failed", (record.get("why", "failed"), *lines))
    if not job.ready():
        return Status(
            job, "to do", (f"waits for {job.needs}" if job.needs else f"{job.backbone} is not there",)
        )
    return Status(job, "to do", _progress(job.folder))


def _finished(job: Job, cell: dict[str, Any], expected: _Expected) -> Status:
    if not job.ready():
        return Status(job, "done", (f"not checked: {job.backbone} is not there",))
    drifted = cell["code"] != expected.code(job.room)
    try:
        inputs = expected.inputs(job)
    except UserError as error:  # of its data: results may be looked at where it is not
        return Status(job, "done", (f"not checked: {error}",), drifted)
    before = cell["inputs"]
    kept = before.get("train", {}).get("precision")
    if kept and inputs["train"]["recipe"].get("precision") == "auto":  # as it was where it was trained
        inputs = inputs | {"train": inputs["train"] | {"precision": kept}}
    keys = stage_keys(inputs)
    wanted, used = inputs["predict"]["recipe"].get("eval_precision", "fp32"), evaluated_in(cell)
    if keys == cell["keys"] and used == wanted:
        return Status(job, "done", _newer_image(job, expected.facts), drifted)
    stage = next((s for s in STAGES if keys[s] != cell["keys"].get(s)), "predict")
    if stage == "predict" and used != wanted:
        return Status(job, "stale", (f"predict: eval_precision={used} (now {wanted})",), drifted, stage)
    changed = [f"{s}: {line}" for s in STAGES for line in differences(before.get(s, {}), inputs[s])]
    return Status(job, "stale", tuple(_plainly(line, job) for line in changed), drifted, stage)


def _newer_image(job: Job, facts: Facts) -> tuple[str, ...]:
    """A line about an image that was written after the cell: its name and size are in the keys, its pixels are not."""
    written, image = facts.newest_image(job.data)
    if written <= (job.folder / "cell.json").stat().st_mtime:
        return ()
    return (
        f"{image} was written after this cell; pixels are in no key: `backbench rerun` shows what they change",
    )


def _plainly(line: str, job: Job) -> str:
    """The line of a fingerprint with what it is of: `train: backbone=ab (now cd) – the weights of a.pt`."""
    if ": backbone=" in line:
        return f"{line}, the weights of {job.backbone}"
    return f"{line}, {job.data}" if ": data=" in line else line


def _cell(folder: Path) -> dict[str, Any] | None:
    try:
        with (folder / "cell.json").open("rb") as file:
            cell = json.load(file)
        known = {"keys", "inputs", "code"} <= cell.keys() and {"eval_precision", "precision"} & cell.keys()
        return cell if known else None
    except (OSError, ValueError, AttributeError):
        return None


def locked_inodes() -> set[int]:
    """The files on which a process of this machine holds a lock (Linux; elsewhere none are known)."""
    try:
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {
        int(line.split()[5].rpartition(":")[2]) for line in lines if " FLOCK " in line and "->" not in line
    }


def _is_locked(folder: Path, locked: set[int]) -> bool:
    """Whether a process holds a run folder; asking takes no lock, which could turn a starting cell away."""
    try:
        return (folder / ".lock").stat().st_ino in locked
    except OSError:
        return False


def _progress(folder: Path) -> tuple[str, ...]:
    log = folder / "log.jsonl"
    if not log.exists():
        return ()
    try:
        return (f"at iteration {json.loads(last_lines(log, 1))['iteration']}",)
    except (ValueError, KeyError):
        return ()


def slurm_queue() -> dict[str, str]:
    """SLURM's job id → state, of everything queued or running; raises UserError when squeue does not answer."""
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-r", "-o", "%i %T"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"squeue does not answer ({error}); is SLURM there?") from None
    return dict(line.split(maxsplit=1) for line in asked.stdout.splitlines() if " " in line)


def summary_line(found: list[Status]) -> str:
    """`24 cells: 20 done (3 of them by other code), 2 stale, 1 failed, 1 to do`."""
    parts = []
    for state in STATES:
        these = [status for status in found if status.state == state]
        drifted = sum(status.drifted for status in these) if state == "done" else 0
        if these:
            parts.append(f"{len(these)} {state}" + (f" ({drifted} of them by other code)" if drifted else ""))
    return f"{len(found)} cells: " + ", ".join(parts)


def status_lines(found: list[Status], every: bool = False) -> list[str]:
    """A line for each cell that is not plainly done (or for all), its reasons below it; then the summary."""
    lines = []
    for status in found:
        state = "code drifted" if status.state == "done" and status.drifted else status.state
        if status.state != "done" or status.drifted or status.why or every:
            first = f": {status.stage}" if status.stage else ""
            lines.append(f"{state + first:<14} {status.job.name}")
            lines += [f"{'':<15}{line}" for line in status.why]
    return [*lines, summary_line(found)]
