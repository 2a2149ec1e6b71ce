"""`--sweep FIELD=A,B,C`: a recipe field chosen for each backbone and task on held-out training images, never on test.

Every backbone gets the same budget: one training a value, with seed 0, on the same part of the training images, scored
on the rest. The chosen cells share one recipe label (`tiny+lr=best_of_0.1_0.01`), so they stand in one column, whose
name is the budget.
"""

from dataclasses import replace
from pathlib import Path

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json
from backbench.common.grid.facts import Facts
from backbench.common.grid.plan import Backbone, Grid, Job, plan_tasks


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """`FIELD=A,B,C` → (FIELD, [A, B, C]). Raises UserError."""
    name, equals, values = text.partition("=")
    found = [value for value in values.split(",") if value]
    if not equals or len(set(found)) < 2 or len(set(found)) < len(found):
        raise UserError(f"--sweep {text}: write it as FIELD=A,B,C, at least two different values")
    if name in ("batch", "seed", "epochs", "iterations"):
        raise UserError(f"--sweep {text}: {name} changes the budget of a training; sweep lr, weight_decay …")
    return name, found


def plan_sweep(grid: Grid, backbones: list[Backbone], tasks: list[str], facts: Facts) -> list[Job]:
    """A training a backbone, task and value, with seed 0, into OUT/grid/sweep; scored on held-out training images."""
    name, values = parse_sweep(grid.sweep)
    apart = replace(grid, out=sweep_folder(grid.out), seeds=1)
    jobs = []
    for value in values:
        setting = f"{name}={value}"
        for job in plan_tasks(apart, backbones, tasks, facts, (setting,), val_share=grid.val_share):
            jobs.append(replace(job, name=f"{job.name}/{setting}"))
    return jobs


def plan_chosen(grid: Grid, backbones: list[Backbone], tasks: list[str], facts: Facts) -> list[Job]:
    """The grid's cells, each with the value that its backbone did best with on the held-out images.

    A backbone and task of which a trial is missing is left out: its failure is in the sweep's own outcomes.
    """
    name, _ = parse_sweep(grid.sweep)
    trials = {job.name: job for job in plan_sweep(grid, backbones, tasks, facts)}
    jobs: list[Job] = []
    for backbone in backbones:
        for task in tasks:
            value = choose(grid, [j for j in trials.values() if _is_of(j, backbone, task)])
            if value is not None:
                setting = (f"{name}={value}",)
                jobs += plan_tasks(grid, [backbone], [task], facts, setting, swept=grid.sweep)
    return sorted(jobs, key=lambda job: job.seed)


def choose(grid: Grid, trials: list[Job]) -> str | None:
    """The value whose cell has the largest primary score, the earlier one of equals; None when one is missing."""
    name, values = parse_sweep(grid.sweep)
    scores: dict[str, float] = {}
    for value in values:
        job = next((j for j in trials if j.name.endswith(f"/{name}={value}")), None)
        if job is None or not (job.folder / "cell.json").exists():
            return None
        cell = read_json(job.folder / "cell.json")
        score = cell["metrics"][cell["primary"]]
        if score is None:
            raise UserError(
                f"{job.folder}: no {cell['primary']} to choose by; see its notes, or drop --sweep"
            )
        scores[value] = score
    return max(values, key=lambda value: scores[value])


def sweep_folder(out: Path) -> Path:
    """Where a results folder keeps the trials of its sweep: no board reads below `grid`."""
    return out.absolute() / "grid" / "sweep"


def _is_of(job: Job, backbone: Backbone, task: str) -> bool:
    from backbench.common.run.tasks import TASKS

    room, model, label = job.name.split("/")[:3]
    return (room, model, label) == (TASKS[task].room, TASKS[task].model, backbone.label)
