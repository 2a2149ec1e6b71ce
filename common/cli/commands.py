"""The subcommands of the grid: run, status, rerun."""

import argparse
import shlex
import time
from dataclasses import replace
from pathlib import Path

from backbench.common.base.arguments import whole
from backbench.common.base.errors import UserError
from backbench.common.base.files import make_folder, user_path, write_json
from backbench.common.grid.facts import Facts
from backbench.common.grid.plan import (
    Backbone,
    Grid,
    Job,
    grid_of,
    name_group,
    only,
    plan_pretrainings,
    plan_tasks,
    read_grid,
)
from backbench.common.grid.plan_file import plan_file, read_plan, write_plan
from backbench.common.grid.status import STATES, Status, look_at, status_lines, summary_line
from backbench.common.grid.sweep import plan_chosen, plan_sweep
from backbench.common.run.tasks import TASKS, expand_tasks

FILES_HELP = """
The folder can be copied into another one's: cells that both have are the same cells. In pandas:
    pandas.json_normalize([json.loads(p.read_text()) for p in Path("results").rglob("cell.json")])
"""

STATUS_HELP = """
A cell is stale when a recipe field, the weights, an annotation file, or the names or sizes of its images are others
than it was made of. What is inside an image is in no key: one that was written after the cell is named below it, and
`backbench verify DATA --full` reads them all. Changed code is shown as drift; `run --strict-code` computes such cells.
"""


def run_arguments(run: argparse.ArgumentParser) -> None:
    """The arguments of `backbench run`; the same names are the keys of a TOML file."""
    run.epilog = FILES_HELP
    run.add_argument("grid", nargs="?", type=user_path, help="a TOML file with the options below as keys")
    run.add_argument(
        "--backbones",
        nargs="+",
        metavar="[GROUP=]SPEC[,SPEC]",
        help="files, torchvision:NAME, scratch:ARCH; several files of a group are its pretraining seeds; the group is "
        "the file's method, where none is given",
    )
    run.add_argument(
        "--pretrain", nargs="+", metavar="METHOD[:seeds=N]", help="pretrain these too, then transfer them"
    )
    run.add_argument("--pretrain-recipe", help="recipe of the pretrainings (default: as --recipe)")
    run.add_argument(
        "--pretrain-arch", help="their network (default: resnet50; tiny and smoke: resnet18_half)"
    )
    run.add_argument("--tasks", nargs="+", help=f"all, or some of {', '.join(TASKS)} (default: all)")
    run.add_argument(
        "--data",
        nargs="*",
        metavar="ROOM=SPEC",
        help="detection=voc:DIR captioning=… wsol=… classification=… (default: scenes, the embedded world)",
    )
    run.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="[WHERE.]FIELD=VALUE",
        help="change a recipe field of every task, or of WHERE: a task, detection or pretrain (ssd300.lr=0.002 "
        "pretrain.size=80)",
    )
    run.add_argument("--recipe", help="recipe name: smoke, tiny, mini or paper (default: tiny)")
    run.add_argument("--seeds", type=whole(1), help="fine-tuning seeds 0 … N−1 (default: 1)")
    run.add_argument(
        "--limit", type=whole(), help="only N images of each split; part of the keys, shown on the board"
    )
    run.add_argument(
        "--sweep",
        metavar="FIELD=A,B,C",
        help="choose this recipe field for each backbone and task on held-out training images",
    )
    run.add_argument("--val-share", type=float, help="the share a sweep holds out (default: 0.2)")
    run.add_argument("--out", type=user_path, help="results folder (default: results)")
    run.add_argument(
        "--executor",
        choices=("local", "slurm", "print"),
        help="processes here, SLURM job arrays, or one command a line (default: local)",
    )
    run.add_argument(
        "--slots",
        type=whole(1),
        help="cells at a time on each GPU (a cell takes one), or sharing the cores (default: 1)",
    )
    run.add_argument(
        "--slurm",
        nargs="*",
        metavar="KEY=VALUE",
        help="partition=, account=, timeout_min=, cpus_per_task=, gpus_per_node=, mem_gb=, array_parallelism= …",
    )
    run.add_argument(
        "--only", metavar="PATTERN", help="cells whose name holds it, e.g. 'ssd300/cutmix' or 'wsol/*/seed0'"
    )
    run.add_argument(
        "--strict-code", action="store_true", help="compute cells again that other code computed"
    )
    run.add_argument(
        "--replace-stale", action="store_true", help="train cells again whose training had other inputs"
    )
    run.add_argument(
        "--no-calibrate", action="store_true", help="do not time a few iterations where nothing is known"
    )
    run.add_argument("--dry-run", action="store_true", help="print the commands, one a line, and run nothing")


def status_arguments(status: argparse.ArgumentParser) -> None:
    """The arguments of `backbench status`."""
    status.epilog = STATUS_HELP
    status.add_argument(
        "grid", type=user_path, metavar="FOLDER|GRID.toml", help="a results folder, or a grid's TOML file"
    )
    status.add_argument("--all", action="store_true", help="a line for every cell")


def rerun_arguments(rerun: argparse.ArgumentParser) -> None:
    """The arguments of `backbench rerun`."""
    rerun.add_argument("cell", help="its folder, or its name: detection/ssd300/cutmix/seed3")
    rerun.add_argument(
        "--results",
        type=user_path,
        default=Path("results"),
        help="where to look for a name (default: results)",
    )
    rerun.add_argument("--keep", type=user_path, metavar="FOLDER", help="keep the new run there")


def run(args: argparse.Namespace) -> int:
    """`backbench run`."""
    grid = grid_of_arguments(args)
    facts, records = Facts(), grid.out.absolute() / "grid"
    start = time.monotonic()
    pretrainings, backbones, tasks = plan_backbones(grid, facts)
    if args.dry_run or grid.executor == "print":
        print_commands(plan_all(grid, pretrainings, backbones, tasks, facts), args.only)
        return 0
    make_folder(records)
    outcomes = []
    if grid.sweep:
        trials = pretrainings + plan_sweep(grid, backbones, tasks, facts)
        outcomes += execute(trials, grid, facts, args)
        jobs = plan_chosen(grid, backbones, tasks, facts)
    else:
        jobs = pretrainings + plan_tasks(grid, backbones, tasks, facts)
    if jobs:
        outcomes += execute(jobs, grid, facts, args)
    return summary(outcomes, grid.out.absolute(), time.monotonic() - start)


def plan_backbones(grid: Grid, facts: Facts) -> tuple[list[Job], list[Backbone], list[str]]:
    """Pretrainings, backbones (theirs, then those given) and tasks of a grid."""
    pretrainings, backbones = plan_pretrainings(grid, facts)
    backbones += [b for group, specs in grid.backbones for b in name_group(group, specs, facts)]
    return pretrainings, backbones, expand_tasks(list(grid.tasks))


def plan_all(
    grid: Grid, pretrainings: list[Job], backbones: list[Backbone], tasks: list[str], facts: Facts
) -> list[Job]:
    """Every job; of a sweep the trials before it has ended, the chosen cells afterwards."""
    if not grid.sweep:
        return pretrainings + plan_tasks(grid, backbones, tasks, facts)
    return pretrainings + (
        plan_chosen(grid, backbones, tasks, facts) or plan_sweep(grid, backbones, tasks, facts)
    )


def execute(jobs: list[Job], grid: Grid, facts: Facts, args: argparse.Namespace) -> list:
    """Leave the plan for `status`, then check, estimate and run the jobs that --only takes."""
    from backbench.common.grid.local import places, run_jobs
    from backbench.common.grid.preflight import calibrate, check, estimates, time_line, worth_calibrating

    out = grid.out.absolute()
    records = make_folder(out / "grid")
    write_plan(out, jobs)
    jobs = only(jobs, args.only) if args.only else jobs
    found = look_at(jobs, records, facts)
    jobs = to_run(found, strict=args.strict_code, replace_stale=args.replace_stale)
    done = {s.job.name for s in found if s.state == "done" and not (args.strict_code and s.drifted)}
    todo = [job for job in jobs if job.name not in done]
    print(summary_line(found))
    if todo:
        for line in check(todo, facts, out):
            print(line)
        slots = grid.slots if grid.executor == "slurm" else len(places(grid.slots))
        known = estimates(todo, found)
        timed = {} if args.no_calibrate or not worth_calibrating(grid) else calibrate(todo, known, facts)
        print(time_line(todo, known | timed, timed, slots), flush=True)

    def is_done(job: Job) -> bool:
        return job.name in done or look_at([job], records, Facts())[0].state == "done"

    if grid.executor == "slurm":
        from backbench.common.grid.slurm import run_slurm

        return run_slurm(jobs, records, grid.slurm, is_done)
    return run_jobs(jobs, records, slots=grid.slots, is_done=is_done)


def to_run(found: list[Status], *, strict: bool, replace_stale: bool) -> list[Job]:
    """The jobs, those to be trained anew marked so. Raises UserError for a stale training that may not be replaced."""
    stale = [status for status in found if status.state == "stale" and status.stage == "train"]
    if stale and not replace_stale:
        first = stale[0]
        raise UserError(
            f"{len(stale)} cells were trained with other inputs, e.g. {first.job.name}: {first.why[0]}; "
            "--replace-stale trains them again, another --out keeps them"
        )
    anew = {status.job.name for status in stale}
    anew |= {status.job.name for status in found if strict and status.state == "done" and status.drifted}
    return [replace(status.job, restart=status.job.name in anew) for status in found]


def print_commands(jobs: list[Job], pattern: str | None) -> None:
    """One command a line, in an order that works."""
    for job in only(jobs, pattern) if pattern else jobs:
        print("python -m", shlex.join(job.command))


def grid_of_arguments(args: argparse.Namespace) -> Grid:
    """The grid of the command line: of its TOML file, the options given beside it in place of the file's.

    Paths in the file count from its folder, those of the command line from where it is given.
    """
    content = {}
    if args.grid:
        file = args.grid.absolute()
        if not file.is_file():
            raise UserError(f"{args.grid}: no such file; a grid is a TOML file, or give --backbones")
        grid = read_grid(file)
        content = {name: getattr(grid, name) for name in Grid.__dataclass_fields__}
    keys = (
        "pretrain_recipe",
        "pretrain_arch",
        "recipe",
        "seeds",
        "limit",
        "sweep",
        "val_share",
        "out",
        "executor",
    )
    given = {key: getattr(args, key) for key in (*keys, "slots", "backbones", "pretrain", "tasks")}
    given |= {"data": pairs("--data", args.data), "slurm": pairs("--slurm", args.slurm)}
    given |= {"set": pairs("--set", args.set)}
    made = {key: value for key, value in given.items() if value is not None}
    if not args.grid:
        return grid_of(made)
    return replace(grid, **{key: getattr(grid_of(content_of(content, made)), key) for key in made})


def content_of(content: dict, made: dict) -> dict:
    """A file's values under the command line's, as `grid_of` reads them."""
    plain = dict(content)
    plain["backbones"] = dict(content["backbones"])
    plain["pretrain"] = {p.method: p.seeds for p in content["pretrain"]}
    return {**plain, **made}


def pairs(option: str, texts: list[str] | None) -> dict | None:
    """`KEY=VALUE` texts as a dict, whole numbers as numbers where the option takes them."""
    if texts is None:
        return None
    made = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{option} {text}: write it as NAME=VALUE")
        made[key] = int(value) if option == "--slurm" and value.isdecimal() else value
    return made


def status(args: argparse.Namespace) -> int:
    """`backbench status`: 1 when a cell failed, else 0."""
    facts = Facts()
    if args.grid.is_dir():
        folder = args.grid.absolute()
        if not plan_file(folder).is_file():
            raise UserError(
                f"{args.grid}: no `backbench run` has planned a grid there; give its TOML file, or list the cells "
                f"that are there: backbench ls {args.grid}"
            )
        jobs = read_plan(folder)
    elif args.grid.is_file():
        grid = read_grid(args.grid)
        pretrainings, backbones, tasks = plan_backbones(grid, facts)
        jobs, folder = plan_all(grid, pretrainings, backbones, tasks, facts), grid.out.absolute()
    else:
        raise UserError(f"{args.grid}: neither a results folder nor a grid's TOML file")
    found = look_at(jobs, folder / "grid", facts)
    print("\n".join(status_lines(found, args.all)))
    return 1 if any(status.state == "failed" for status in found) else 0


def rerun(args: argparse.Namespace) -> int:
    """`backbench rerun`: 0 when the numbers are the same."""
    from backbench.common.grid.rerun import find_cell, rerun_cell

    folder = find_cell(args.cell, args.results)
    print(f"again: {folder}", flush=True)
    lines, equal = rerun_cell(folder, args.keep)
    print("\n".join(lines))
    return 0 if equal else 1


def summary(outcomes: list, out: Path, seconds: float) -> int:
    """The board of what is there, then how the cells ended."""
    from backbench.common.board.cells import load_cells
    from backbench.common.report.html import write_report
    from backbench.common.report.table import board_json, board_text, make_board

    count = {state: sum(o.state == state for o in outcomes) for state in ("done", "done before", "failed")}
    cells = load_cells(out)
    if cells:
        board = make_board(cells)
        report = out / "report.html"
        write_report(cells, board, report)
        write_json(out / "board.json", board_json(board))
        print(f"\n{board_text(board)}\n")
        print(f"report: {report}")
    print(
        f"{count['done']} cells computed, {count['done before']} finished before, {count['failed']} failed; "
        f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    )
    for outcome in outcomes:
        if outcome.state == "failed":
            print(f"failed: {outcome.job.name}; try: python -m {shlex.join(outcome.job.command)}")
    return 1 if count["failed"] else 0


__all__ = ["STATES", "rerun", "run", "status", "summary"]
