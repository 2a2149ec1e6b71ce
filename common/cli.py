"""The `backbench` command."""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from common.board.cells import load_cells
from common.board.demo import run_demo
from common.board.grid import TASKS, Outcome, expand_tasks, plan_tasks, run_jobs
from common.board.report import write_report
from common.board.table import board_csv, board_json, board_markdown, board_text, make_board
from common.errors import UserError, run_main
from common.export import TARGETS, export
from common.files import make_folder, write_json, write_text
from common.transfer import reading, reading_arguments
from common.trunk import ARCHS


def main() -> None:
    """Entry point: `backbench SUBCOMMAND …`."""
    run_main(_main)


def _main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    return args.run(args)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="backbench", description="How well does a pretrained ResNet transfer?"
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(
        commands,
        "demo",
        _demo,
        "pretrain four backbones on the embedded world, transfer them, show the board",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    demo.add_argument(
        "--recipe", default="tiny", help="recipe of every cell: tiny, or smoke for a quick look"
    )
    demo.add_argument(
        "--arch", default="resnet18_half", choices=list(ARCHS), help="network (default: resnet18_half)"
    )
    demo.add_argument("--seeds", type=int, default=1, help="fine-tuning seeds a cell (default: 1)")
    slots = min(4, os.cpu_count() or 1)  # a cell takes about a gigabyte
    demo.add_argument(
        "--slots", type=int, default=slots, help="cells at a time (default: one a core, at most 4)"
    )
    demo.add_argument("--tasks", nargs="+", default=["all"], help=f"all, or some of {', '.join(TASKS)}")

    run = _command(commands, "run", _run, "transfer backbones to tasks, then show the board")
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

    board = _command(commands, "board", _board, "show the leaderboard of a folder of cells")
    board.add_argument("folder", type=Path)
    board.add_argument("--baseline", default="baseline", help="the backbone that differences are taken to")
    for kind, what in (("json", "JSON"), ("csv", "CSV"), ("markdown", "Markdown")):
        board.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"also write it as {what}")

    report = _command(commands, "report", _report, "write one offline HTML file about a folder of cells")
    report.add_argument("folder", type=Path)
    report.add_argument("--out", type=Path, help="the file (default: FOLDER/report.html)")
    report.add_argument("--baseline", default="baseline", help="the backbone that differences are taken to")

    listing = _command(commands, "ls", _list, "list the cells of a folder")
    listing.add_argument("folder", type=Path)

    exporting = _command(commands, "export", _export, "write a checkpoint as another library reads it")
    exporting.add_argument("backbone", help="a checkpoint file, torchvision:NAME or timm:NAME")
    exporting.add_argument("--to", required=True, choices=TARGETS)
    exporting.add_argument("--out", type=Path, required=True, help="the file")
    reading_arguments(exporting)

    verify = _command(commands, "verify", _verify, "is a data set complete, and are its images readable?")
    verify.add_argument(
        "spec", metavar="KIND:DIR", help="imagenet, cifar10, cifar100, cub, voc, coco, captions or folder"
    )
    verify.add_argument("--full", action="store_true", help="read every image, not a sample")

    fetch = _command(commands, "fetch", _fetch, "download a published data set, or say where it is to be had")
    fetch.add_argument("name", help="cifar10, cifar100, voc0712, coco2014, cub, imagenette-160, imagenet …")
    fetch.add_argument("--root", type=Path, default=Path("data"), help="where to (default: data)")
    fetch.add_argument(
        "--url-base", metavar="URL", help="a mirror: replaces all but the file name of each URL"
    )
    return made


def _command(commands, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=text, description=text)
    made.set_defaults(run=run)
    return made


def _demo(args: argparse.Namespace) -> int:
    start = time.monotonic()
    out = make_folder(args.out).absolute()
    tasks, seeds = expand_tasks(args.tasks), list(range(args.seeds))
    outcomes = run_demo(out, recipe=args.recipe, arch=args.arch, seeds=seeds, tasks=tasks, slots=args.slots)
    return _summary(outcomes, out, time.monotonic() - start)


def _run(args: argparse.Namespace) -> int:
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
    return _summary(run_jobs(jobs, out / "grid", args.slots), out, time.monotonic() - start)


def _summary(outcomes: list[Outcome], out: Path, seconds: float) -> int:
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


def _cells(folder: Path) -> list:
    cells = load_cells(folder)
    if not cells:
        raise UserError(
            f"{folder}: no finished cell (cell.json) in it; give a results folder, e.g. results or demo"
        )
    return cells


def _board(args: argparse.Namespace) -> int:
    board = make_board(_cells(args.folder), baseline=args.baseline)
    print(board_text(board))
    if args.json:
        write_json(args.json, board_json(board))
    if args.csv:
        write_text(args.csv, board_csv(board))
    if args.markdown:
        write_text(args.markdown, board_markdown(board))
    return 0


def _report(args: argparse.Namespace) -> int:
    cells = _cells(args.folder)
    path = args.out or args.folder / "report.html"
    write_report(cells, make_board(cells, baseline=args.baseline), path)
    print(f"report: {path.absolute()}")
    return 0


def _list(args: argparse.Namespace) -> int:
    for cell in _cells(args.folder):
        value = cell.metrics[cell.primary]
        shown = "n/a" if value is None else f"{100 * value:.2f}"
        print(f"{cell.primary:>10} {shown:>7}  {cell.folder}")
    return 0


def _export(args: argparse.Namespace) -> int:
    for line in export(args.backbone, args.to, args.out, **reading(args)):
        print(line)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from common.data.verify import verify

    return verify(args.spec, full=args.full)


def _fetch(args: argparse.Namespace) -> int:
    from common.data.fetch import fetch

    return fetch(args.name, args.root, args.url_base)


if __name__ == "__main__":
    main()
