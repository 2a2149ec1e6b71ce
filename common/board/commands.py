"""The subcommands of the grid: run, status, rerun."""

import argparse
import time
from pathlib import Path

from common.errors import UserError
from common.files import make_folder, write_json


def run_arguments(run: argparse.ArgumentParser) -> None:
    from common.board.tasks import TASKS

    run.add_argument(
        "--backbones",
        nargs="+",
        required=True,
        metavar="[NAME=]SPEC",
        help="files, torchvision:NAME, scratch:ARCH",
    )
    run.add_argument(
        "--tasks", nargs="+", default=["all"], help=f"all, or some of {', '.join(TASKS)} (default: all)"
    )
    run.add_argument(
        "--data",
        nargs="*",
        default=[],
        metavar="ROOM=SPEC",
        help="detection=voc:DIR captioning=… wsol=… (default: scenes)",
    )
    run.add_argument(
        "--recipe", default="tiny", help="recipe name: smoke, tiny, mini or paper (default: tiny)"
    )
    run.add_argument("--seeds", type=int, default=1, help="fine-tuning seeds 0 … N−1 (default: 1)")
    run.add_argument("--out", type=Path, default=Path("results"), help="results folder (default: results)")
    run.add_argument(
        "--slots", type=int, default=1, help="cells at a time, the cores shared out (default: 1)"
    )
    run.add_argument("--dry-run", action="store_true", help="print the commands, one a line, and run nothing")


def status_arguments(status: argparse.ArgumentParser) -> None:
    status.add_argument("folder", type=Path)


def rerun_arguments(rerun: argparse.ArgumentParser) -> None:
    rerun.add_argument("cell")


def run(args: argparse.Namespace) -> int:
    from common.board.grid import plan_tasks, run_jobs
    from common.board.tasks import expand_tasks

    data = dict.fromkeys(
        ("detection", "captioning", "wsol"), "scenes:size=smoke" if args.recipe == "smoke" else "scenes"
    )
    for text in args.data:
        room, equals, spec = text.partition("=")
        if not equals or room not in data:
            raise UserError(f"--data {text}: write it as ROOM=SPEC, ROOM one of {', '.join(data)}")
        data[room] = spec
    out, tasks = args.out.absolute(), expand_tasks(args.tasks)
    jobs = plan_tasks(args.backbones, tasks, data, list(range(args.seeds)), args.recipe, out)
    if args.dry_run:
        for job in jobs:
            print("python -m", *job.command)
        return 0
    for job in jobs:
        if job.backbone and not job.backbone.exists():
            raise UserError(f"{job.backbone}: no such backbone file")
    for room in {job.room for job in jobs}:
        next(
            job for job in jobs if job.room == room
        ).stamp()  # data and file are there and readable, before the first hour
    make_folder(out)
    start = time.monotonic()
    return summary(run_jobs(jobs, out / "grid", args.slots), out, time.monotonic() - start)


def status(args: argparse.Namespace) -> int:
    raise UserError("status: being written")


def rerun(args: argparse.Namespace) -> int:
    raise UserError("rerun: being written")


def summary(outcomes: list, out: Path, seconds: float) -> int:
    from common.board.cells import load_cells
    from common.board.report import write_report
    from common.board.table import board_json, board_text, make_board

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
            print(f"failed: {outcome.job.name}; try: python -m {' '.join(outcome.job.command)}")
    return 1 if count["failed"] else 0
