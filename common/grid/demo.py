"""`backbench demo`: the whole path on the embedded world, from four pretrainings to a report."""

from pathlib import Path

from backbench.common.base.files import make_folder
from backbench.common.grid.facts import Facts
from backbench.common.grid.local import Outcome, run_jobs
from backbench.common.grid.plan import Backbone, Grid, Job, plan_tasks, pretrain_job
from backbench.common.grid.plan_file import write_plan
from backbench.common.grid.status import look_at
from backbench.common.run.tasks import READERS

METHODS = ("baseline", "mixup", "cutout", "cutmix")  # the paper's comparison


def run_demo(
    out: Path, *, recipe: str, arch: str, seeds: list[int], tasks: list[str], slots: int
) -> list[Outcome]:
    """Pretrain four backbones, transfer each and random weights to every task: 4 + 5 × 4 cells a seed."""
    facts = Facts()
    for room in READERS:  # draws the world and checks it, before the first cell
        facts.data(room, Grid(recipe=recipe).data_of(room))
    jobs = plan_demo(out, recipe, arch, len(seeds), tasks, facts)
    records = make_folder(out / "grid")
    write_plan(out, jobs)

    def is_done(job: Job) -> bool:
        return look_at([job], records, facts)[0].state == "done"

    return run_jobs(jobs, records, slots=slots, is_done=is_done)


def plan_demo(out: Path, recipe: str, arch: str, seeds: int, tasks: list[str], facts: Facts) -> list[Job]:
    """The demo's jobs in order."""
    grid = Grid(recipe=recipe, out=out / "results", seeds=seeds)
    pretrainings = [
        pretrain_job(m, out / "pretrain" / m, recipe=recipe, arch=arch, data=grid.data_of("classification"))
        for m in METHODS
    ]
    backbones = [
        Backbone(str(job.writes.absolute()), writer=job.name, label=method)
        for job, method in zip(pretrainings, METHODS)
    ]
    random = Backbone(f"scratch:{arch}", label="scratch")
    transfers = plan_tasks(grid, [*backbones, random], tasks, facts)
    return pretrainings + transfers
