"""The plan that a grid leaves in its results folder, read by `backbench status` wherever it lies then."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from backbench.common.base.files import read_json, write_json
from backbench.common.grid.plan import Job


def plan_file(out: Path) -> Path:
    """Where a results folder keeps the plan of its grid."""
    return out / "grid" / "plan.json"


def write_plan(out: Path, jobs: list[Job]) -> None:
    """Leave a results folder the plan of its grid, for `backbench status`."""
    content = {"out": str(out), "folder": str(Path.cwd()), "jobs": jobs_to_json(jobs)}
    write_json(plan_file(out), content)


def read_plan(out: Path) -> list[Job]:
    """The jobs that a grid planned in a results folder; where that was moved or copied, as they lie there now.

    Goes to the folder where they were planned, from which older plans name data. Raises UserError when there is none.
    """
    content = read_json(plan_file(out))
    jobs, place = jobs_of_json(content["jobs"]), Path(content["folder"])
    before = Path(content.get("out") or _out_of(jobs, out))
    if not (before.exists() and before.samefile(out)):
        jobs = [_moved(job, before, out) for job in jobs]
        if not place.is_dir():  # moved with all that is around it
            place = out / os.path.relpath(place, before)
    if place.is_dir():
        os.chdir(place)
    return jobs


def _out_of(jobs: list[Job], default: Path) -> Path:
    """The folder that jobs were planned in, of a plan that does not say it."""
    for job in jobs:
        if job.room == "classification":  # OUT/pretrain/NAME
            return job.folder.parents[1]
    for job in jobs:
        out = Path(job.command[job.command.index("--out") + 1])
        return out.parents[1] if out.parts[-2:] == ("grid", "sweep") else out
    return default


def _moved(job: Job, before: Path, now: Path) -> Job:
    """The job with every path below the folder `before` put below `now`; a backbone file only where it is there."""

    def there(text: str) -> str:
        path = Path(text)
        return str(now / path.relative_to(before)) if path.is_relative_to(before) else text

    moved = dataclasses.replace(
        job,
        folder=Path(there(str(job.folder))),
        writes=job.writes and Path(there(str(job.writes))),
        backbone=there(job.backbone),
        command=tuple(map(there, job.command)),
    )
    return moved if moved.ready() or not job.ready() else dataclasses.replace(moved, backbone=job.backbone)


def jobs_to_json(jobs: list[Job]) -> list[dict[str, Any]]:
    """Plain values of jobs."""
    return [
        {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(job).items()} for job in jobs
    ]


def jobs_of_json(content: list[dict[str, Any]]) -> list[Job]:
    """The jobs of `jobs_to_json`."""
    made = []
    for entry in content:
        room, model, name, settings, fixed = entry["recipe"] or ("", "", "", (), ())
        entry = {
            **entry,
            "command": tuple(entry["command"]),
            "folder": Path(entry["folder"]),
            "recipe": (room, model, name, tuple(settings), tuple(fixed)) if room else (),
            "writes": Path(entry["writes"]) if entry["writes"] else None,
        }
        made.append(Job(**entry))
    return made
