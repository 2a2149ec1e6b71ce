"""Before the first cell: is everything there, is there room for it, and how long will it take?"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.grid.facts import Facts, child_env, python_command
from backbench.common.grid.plan import Grid, Job
from backbench.common.grid.status import Status

CALIBRATION_ITERATIONS, CALIBRATION_IMAGES = 12, 64
FILES_PER_CELL = (
    6  # in sizes of the backbone: weights, and the resume state with its optimiser, twice while replaced
)
LEAST_MEGABYTES = 100  # of a cell, for predictions and reports


def check(jobs: list[Job], facts: Facts, out: Path) -> list[str]:
    """Read data and weights, look for room and for Java; the lines to print. Raises UserError for what is missing.

    `jobs` are those to do.
    """
    lines = []
    for room, spec, limit, share in dict.fromkeys((j.room, j.data, j.limit, j.val_share) for j in jobs):
        found = facts.data(room, spec, limit, share)
        lines.append(f"data: {room} {spec}: {found['train_images']} → {found['test_images']} images")
    sizes = {}
    for spec in dict.fromkeys(job.backbone for job in jobs if job.backbone and job.ready()):
        found = facts.backbone(spec)
        sizes[spec] = found["megabytes"]
        lines.append(f"weights: {spec}: {found['arch']}, {found['megabytes']:.0f} MB, {found['fingerprint']}")
    lines.append(check_disk(jobs, sizes, out))
    if any(job.room == "captioning" for job in jobs):
        lines.append(check_java())
    return lines


def check_disk(jobs: list[Job], megabytes: dict[str, float], out: Path) -> str:
    """Refuse when the cells' files cannot fit: weights and resume state of each, by the size of its backbone."""
    usual = max(megabytes.values(), default=100.0)
    needed = sum(LEAST_MEGABYTES + FILES_PER_CELL * megabytes.get(job.backbone, usual) for job in jobs)
    folder = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(folder).free / 2**20
    if free < needed:
        raise UserError(
            f"{out}: {free / 1024:.1f} GB free, about {needed / 1024:.1f} GB needed for {len(jobs)} cells; free some, "
            "choose another --out, or --only some of them"
        )
    return f"disk: up to {needed / 1024:.1f} GB of {free / 1024:.0f} GB free"


def check_java() -> str:
    """Whether METEOR can be computed; without Java it will read n/a, nothing else is lost."""
    script = "from backbench.captioning.java import find_java; print(find_java())"
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=child_env(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if found.returncode == 0:
        version = subprocess.run(
            [found.stdout.strip(), "-version"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if version.returncode == 0:
            return f"Java: {(version.stderr.splitlines() or ['found'])[0]}"
    why = (found.stderr.strip().splitlines() or ["it does not start"])[-1]
    return f"warning: Java: {why.rpartition('JavaError: ')[2]}; METEOR will read n/a"


def estimates(jobs: list[Job], found: Iterable[Status]) -> dict[str, float]:
    """Seconds a cell of each kind, the mean of the finished ones of the same recipe and limit; unknown kinds absent."""
    seconds: dict[str, list[float]] = {}
    for status in found:
        if status.state in ("done", "stale"):
            cost = json.loads((status.job.folder / "cell.json").read_text(encoding="utf-8"))["cost"]
            spent = sum(cost.get(f"{stage}_s", 0.0) for stage in ("train", "predict", "score"))
            seconds.setdefault(status.job.kind, []).append(spent)
    kinds = {job.kind for job in jobs}
    return {kind: mean(values) for kind, values in seconds.items() if kind in kinds}


def calibrate(jobs: list[Job], known: dict[str, float], facts: Facts) -> dict[str, float]:
    """Time a few iterations on a few images for each kind without an estimate; seconds a cell, roughly.

    One short training of the kind's first job, apart: its rate times the iterations of a whole one, its prediction
    time times the images. A kind that cannot be calibrated (its backbone is not there yet, the cell fails) is left out.
    """
    found = {}
    for kind in dict.fromkeys(job.kind for job in jobs if job.kind not in known):
        job = next((j for j in jobs if j.kind == kind and j.ready()), None)
        if job is None or job.room == "classification":
            continue
        with tempfile.TemporaryDirectory() as scratch:
            cell = _short(job, Path(scratch))
        if cell is not None:
            found[kind] = _whole(job, *cell, facts)
    return found


def _short(job: Job, scratch: Path) -> tuple[dict[str, Any], float] | None:
    command = _with_out(job.command, scratch)
    settings = ("epochs=0", f"iterations={CALIBRATION_ITERATIONS}", "milestones=", "log_every=2")
    command += tuple(part for setting in settings for part in ("--set", setting))
    command += ("--limit", str(CALIBRATION_IMAGES))
    subprocess.run(python_command(command), env=child_env(), capture_output=True, check=False)
    path = next(scratch.rglob("cell.json"), None)
    if path is None:
        return None
    lines = [
        json.loads(line) for line in (path.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    timed = [(line["iteration"], line["seconds"]) for line in lines if "seconds" in line]
    (first, before), (last, after) = (
        timed[len(timed) // 2 - 1],
        timed[-1],
    )  # the first iterations start things up
    return json.loads(path.read_text(encoding="utf-8"))["cost"], (after - before) / max(1, last - first)


def _whole(job: Job, cost: dict[str, Any], rate: float, facts: Facts) -> float:
    data = facts.data(job.room, job.data, job.limit, job.val_share)
    fields = facts.recipes([job.recipe])[0]["fields"]["train"]
    iterations = fields["iterations"] or fields["epochs"] * data["train_images"] / fields["batch"]
    share = data["test_images"] / min(CALIBRATION_IMAGES, data["test_images"])
    return rate * iterations + share * (cost.get("predict_s", 0.0) + cost.get("score_s", 0.0))


def _with_out(command: tuple[str, ...], out: Path) -> tuple[str, ...]:
    """The command with another --out, and without --restart."""
    made = [part for part in command if part != "--restart"]
    made[made.index("--out") + 1] = str(out)
    return tuple(made)


def time_line(jobs: list[Job], seconds: dict[str, float], calibrated: Iterable[str], slots: int) -> str:
    """`time: about 3:20 h for 24 cells, 2 at a time (from finished cells; calibrated: wsol/cam; unknown: …)`."""
    known = [seconds[job.kind] for job in jobs if job.kind in seconds]
    unknown = sorted({job.kind for job in jobs if job.kind not in seconds})
    calibrated = sorted(set(calibrated))
    measured = sorted({job.kind for job in jobs} - set(unknown) - set(calibrated))
    parts = [
        f"{what}: {', '.join(kinds)}"
        for what, kinds in (
            ("from finished cells", measured),
            ("calibrated", calibrated),
            ("unknown", unknown),
        )
        if kinds
    ]
    if not known:
        return f"time: unknown before the first cells end ({'; '.join(parts)})"
    minutes = round(sum(known) / max(1, min(slots, len(jobs))) / 60)
    about = f"{minutes // 60}:{minutes % 60:02d} h"
    return f"time: about {about} for {len(known)} of {len(jobs)} cells ({'; '.join(parts)})"


def worth_calibrating(grid: Grid) -> bool:
    """A cell of the small recipes takes little longer than its calibration."""
    return not re.match(r"(smoke|tiny)", grid.recipe)
