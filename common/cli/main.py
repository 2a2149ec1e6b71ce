"""The `backbench` command. Each subcommand imports what it needs, so that `backbench status` answers at once."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from backbench.common.base.arguments import Parser, whole
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, user_path, write_json, write_text


def main() -> None:
    """Entry point: `backbench SUBCOMMAND …`."""
    run_main(_main)


def _main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv[0] if argv else "").parse_args(argv)
    return args.run(args)


def arguments(chosen: str = "") -> argparse.ArgumentParser:
    """The command line; the arguments of `chosen` alone are filled in, for some need slow imports."""
    made = Parser(prog="backbench", description="How well does a pretrained ResNet transfer?")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for name, (text, fill, run) in COMMANDS.items():
        parser = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.set_defaults(run=run)
        if name == chosen:
            fill(parser)
    return made


def demo_arguments(demo: argparse.ArgumentParser) -> None:
    from backbench.common.backbones.resnet import ARCHS
    from backbench.common.run.tasks import TASKS

    demo.add_argument("--out", type=user_path, default=Path("demo"), help="output folder (default: demo)")
    demo.add_argument(
        "--recipe", default="tiny", help="recipe of every cell: tiny, or smoke for a quick look"
    )
    demo.add_argument(
        "--arch", default="resnet18_half", choices=list(ARCHS), help="network (default: resnet18_half)"
    )
    demo.add_argument("--seeds", type=whole(1), default=1, help="fine-tuning seeds a cell (default: 1)")
    slots = min(4, os.cpu_count() or 1)  # a cell takes about a gigabyte
    demo.add_argument(
        "--slots", type=whole(1), default=slots, help="cells at a time (default: one a core, at most 4)"
    )
    demo.add_argument("--tasks", nargs="+", default=["all"], help=f"all, or some of {', '.join(TASKS)}")


def run_arguments(run: argparse.ArgumentParser) -> None:
    from backbench.common.cli.commands import run_arguments

    run_arguments(run)


def status_arguments(status: argparse.ArgumentParser) -> None:
    from backbench.common.cli.commands import status_arguments

    status_arguments(status)


def rerun_arguments(rerun: argparse.ArgumentParser) -> None:
    from backbench.common.cli.commands import rerun_arguments

    rerun_arguments(rerun)


def board_arguments(board: argparse.ArgumentParser) -> None:
    board.add_argument("folder", type=user_path, help="results folder, e.g. results or demo")
    board.add_argument("--baseline", default="baseline", help="the backbone that differences are taken to")
    for kind, what in (("json", "JSON"), ("csv", "CSV"), ("markdown", "Markdown"), ("latex", "LaTeX")):
        board.add_argument(f"--{kind}", type=user_path, metavar="FILE", help=f"also write it as {what}")
    board.add_argument(
        "--methods", type=user_path, metavar="FILE", help="write the methods paragraph, .md or .tex"
    )
    board.add_argument("--mean-rank", action="store_true", help="one number a backbone, too: its mean rank")


def report_arguments(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", type=user_path, help="results folder, e.g. results or demo")
    report.add_argument("--out", type=user_path, help="the file (default: FOLDER/report.html)")
    report.add_argument("--baseline", default="baseline", help="the backbone that differences are taken to")


def list_arguments(listing: argparse.ArgumentParser) -> None:
    listing.add_argument("folder", type=user_path, help="results folder, e.g. results or demo")


def export_arguments(exporting: argparse.ArgumentParser) -> None:
    from backbench.common.backbones.export import TARGETS
    from backbench.common.run.transfer import reading_arguments

    exporting.add_argument("backbone", help="a checkpoint file, torchvision:NAME or timm:NAME")
    exporting.add_argument("--to", required=True, choices=TARGETS, help="the library")
    exporting.add_argument("--out", type=user_path, required=True, help="the file")
    reading_arguments(exporting)


def verify_arguments(verify: argparse.ArgumentParser) -> None:
    verify.add_argument(
        "spec",
        metavar="KIND:DIR",
        help="imagenet, ilsvrc (with boxes), tiny_imagenet, cifar10, cifar100, cub, voc, coco, captions or folder, "
        "with the options of --data, e.g. voc:VOCDEVKIT,year=2007+2012",
    )
    verify.add_argument("--full", action="store_true", help="read every image, not a sample")


def fetch_arguments(fetch: argparse.ArgumentParser) -> None:
    fetch.add_argument("name", help="cifar10, cifar100, voc0712, coco2014, cub, imagenette-160, imagenet …")
    fetch.add_argument("--root", type=user_path, default=Path("data"), help="where to (default: data)")
    fetch.add_argument(
        "--url-base", metavar="URL", help="a mirror: replaces all but the file name of each URL"
    )


def _demo(args: argparse.Namespace) -> int:
    from backbench.common.cli.commands import summary
    from backbench.common.grid.demo import run_demo
    from backbench.common.run.tasks import expand_tasks

    start = time.monotonic()
    out = make_folder(args.out).absolute()
    tasks, seeds = expand_tasks(args.tasks), list(range(args.seeds))
    outcomes = run_demo(out, recipe=args.recipe, arch=args.arch, seeds=seeds, tasks=tasks, slots=args.slots)
    return summary(outcomes, out, time.monotonic() - start)


def _run(args: argparse.Namespace) -> int:
    from backbench.common.cli.commands import run

    return run(args)


def _status(args: argparse.Namespace) -> int:
    from backbench.common.cli.commands import status

    return status(args)


def _rerun(args: argparse.Namespace) -> int:
    from backbench.common.cli.commands import rerun

    return rerun(args)


def _cells(folder: Path) -> list:
    from backbench.common.board.cells import load_cells

    cells = load_cells(folder)
    if not cells:
        raise UserError(
            f"{folder}: no finished cell (cell.json) in it; give a results folder, e.g. results or demo"
        )
    return cells


def _board(args: argparse.Namespace) -> int:
    from backbench.common.report.table import board_csv, board_json, board_markdown, board_text, make_board
    from backbench.common.report.writing import board_latex, methods

    board = make_board(_cells(args.folder), baseline=args.baseline)
    print(board_text(board, args.mean_rank))
    for path in filter(None, (args.json, args.csv, args.markdown, args.latex, args.methods)):
        make_folder(path.parent)
    if args.json:
        write_json(args.json, board_json(board))
    if args.csv:
        write_text(args.csv, board_csv(board))
    if args.markdown:
        write_text(args.markdown, board_markdown(board))
    if args.latex:
        write_text(args.latex, board_latex(board))
    if args.methods:
        write_text(args.methods, methods(board, args.methods.suffix))
    return 0


def _report(args: argparse.Namespace) -> int:
    from backbench.common.report.html import write_report
    from backbench.common.report.table import make_board

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
    from backbench.common.backbones.export import export
    from backbench.common.run.transfer import reading

    for line in export(args.backbone, args.to, args.out, **reading(args)):
        print(line)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from backbench.common.data.verify import verify

    return verify(args.spec, full=args.full)


def _fetch(args: argparse.Namespace) -> int:
    from backbench.common.data.fetch import fetch

    return fetch(args.name, args.root, args.url_base)


COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "demo": (
        "pretrain four backbones on the embedded world, transfer them, show the board",
        demo_arguments,
        _demo,
    ),
    "run": ("transfer backbones to tasks, then show the board", run_arguments, _run),
    "status": ("what of a grid is done, stale, failed, running or to do", status_arguments, _status),
    "rerun": ("compute one finished cell again, apart, and print the difference", rerun_arguments, _rerun),
    "board": ("show the leaderboard of a folder of cells", board_arguments, _board),
    "report": ("write one offline HTML file about a folder of cells", report_arguments, _report),
    "ls": ("list the cells of a folder", list_arguments, _list),
    "export": ("write a checkpoint as another library reads it", export_arguments, _export),
    "verify": ("is a data set complete, and are its images readable?", verify_arguments, _verify),
    "fetch": (
        "download a published data set, or say where it is to be had",
        fetch_arguments,
        _fetch,
    ),
}


if __name__ == "__main__":
    main()
