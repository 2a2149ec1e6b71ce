"""`backbench status` of 1,000 finished cells (4 tasks × 50 backbones × 5 seeds), synthetic: wall and CPU seconds.

    python tests/benchmarks/bench_status.py [--rounds 3] [--json FILE]

No peer answers the question. The first round reads data, weights, recipes and code, the others find them remembered.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_grid import finish, save

from backbench.common.base.files import make_folder, write_json
from backbench.common.grid.facts import Facts
from backbench.common.grid.plan import Grid, name_group, plan_tasks
from backbench.common.grid.plan_file import jobs_to_json, plan_file


def main() -> None:
    """Write the cells, time the command."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--json", type=Path)
    args = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out, facts = Path(folder), Facts()
        files = [save(out / f"m{k:02d}.pth") for k in range(50)]
        backbones = [b for file in files for b in name_group("", [file], facts)]
        grid = Grid(recipe="smoke", out=out / "results", seeds=5)
        jobs = plan_tasks(grid, backbones, ["ssd300", "faster_rcnn", "captioning", "wsol"], facts)
        for job in jobs:
            finish(job, facts)
        make_folder(out / "results" / "grid")
        write_json(plan_file(out / "results"), {"folder": str(ROOT), "jobs": jobs_to_json(jobs)})
        rounds = [time_once(out / "results") for _ in range(args.rounds)]
    best = {"cells": len(jobs), "wall_s": min(r[0] for r in rounds), "cpu_s": min(r[1] for r in rounds)}
    print(json.dumps(best))
    if args.json:
        write_json(args.json, best)


def time_once(results: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command, Python's start included."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "backbench.common.cli.main", "status", str(results)], env=env, check=True
    )
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
