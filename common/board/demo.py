"""`backbench demo`: the whole path on the embedded world, from four pretrainings to a report."""

from pathlib import Path

from common.board.grid import Job, Outcome, fingerprints, plan_tasks, run_jobs
from common.board.tasks import READERS, TASKS

METHODS = ("baseline", "mixup", "cutout", "cutmix")  # the paper's comparison


def run_demo(
    out: Path, *, recipe: str, arch: str, seeds: list[int], tasks: list[str], slots: int
) -> list[Outcome]:
    """Pretrain four backbones, transfer each and random weights to every task: 4 + 5 × 4 cells a seed."""
    data = "scenes:size=smoke" if recipe == "smoke" else "scenes"
    for room in READERS:  # draws the world and checks it, before the first cell
        fingerprints(room, data, 0)
    return run_jobs(plan_demo(out, data, recipe, arch, seeds, tasks), out / "grid", slots)


def plan_demo(out: Path, data: str, recipe: str, arch: str, seeds: list[int], tasks: list[str]) -> list[Job]:
    """The demo's jobs in order."""
    jobs: list[Job] = []
    writers: dict[Path, str] = {}
    for method in METHODS:
        folder = out / "pretrain" / method
        command = ("pretrain.run", "--method", method, "--recipe", recipe, "--arch", arch)
        command += ("--data", data, "--out", str(folder))
        jobs.append(Job(f"pretrain/{method}", command, "classification", data))
        writers[(folder / f"{method}.pt").absolute()] = jobs[-1].name
    specs = dict.fromkeys((task.room for task in TASKS.values()), data)
    backbones = [*map(str, writers), f"scratch:{arch}"]
    return jobs + plan_tasks(backbones, tasks, specs, seeds, recipe, out / "results", writers)
