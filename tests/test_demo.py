"""The whole path through the command that users call: every cell, the board, a second call, a death in the middle."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[1]


def command(out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "backbench.common.cli.main",
        "demo",
        "--recipe",
        "smoke",
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished smoke demo: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def cells(out: Path) -> dict[str, dict]:
    return {
        str(path.parent.relative_to(out)): json.loads(path.read_text())
        for path in sorted(out.rglob("cell.json"))
    }


def test_every_cell_is_there_and_scored(demo):
    out, printed = demo
    found = cells(out)
    assert len(found) == 24 and "24 cells computed, 0 finished before, 0 failed" in printed
    tasks = [cell["identity"]["task"] for cell in found.values()]
    assert {task: tasks.count(task) for task in set(tasks)} == {
        "classification": 4,
        "detection": 10,
        "captioning": 5,
        "wsol": 5,
    }
    for path, cell in found.items():
        assert cell["metrics"][cell["primary"]] is not None and cell["primary"] in cell["chance"], path
        for name in ("recipe.json", "provenance.json", "log.jsonl", "images.npz", "report.md", "report.json"):
            assert (out / path / name).exists(), f"{path}/{name}"


def test_board_and_report_show_every_backbone(demo):
    out, printed = demo
    board, report = (out / "board.json").read_text(), (out / "report.html").read_text()
    for backbone in ("baseline", "mixup", "cutout", "cutmix", "scratch"):
        assert backbone in printed and backbone in board and backbone in report
    assert "machinery, not the science" in printed and "http://" not in report.replace(
        "http://www.w3.org", ""
    )


def test_a_second_call_computes_nothing(demo):
    out, _ = demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("cell.json")}
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and "0 cells computed, 24 finished before" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("cell.json")} == before


def test_killed_in_the_middle_and_run_again_ends_in_the_same_numbers(demo, tmp_path):
    whole, _ = demo
    more = ("--tasks", "wsol")
    process = subprocess.Popen(
        command(tmp_path, *more), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: list(tmp_path.glob("results/*/wsol/*/*/*/*/log.jsonl")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("report.html"))
    done = subprocess.run(
        command(tmp_path, *more), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout
    expected = {k: v for k, v in cells(whole).items() if v["identity"]["task"] in ("classification", "wsol")}
    found = cells(tmp_path)
    assert found.keys() == expected.keys()
    for path, cell in found.items():
        assert cell["metrics"] == expected[path]["metrics"] and cell["keys"] == expected[path]["keys"]
        for name in ("images.npz", *(f for f in cell["files"] if f.startswith(("predictions", "scoremaps")))):
            assert (tmp_path / path / name).read_bytes() == (whole / path / name).read_bytes(), (
                f"{path}/{name}"
            )


def test_rescoring_a_cell_from_its_images_gives_its_metrics(demo):
    from backbench.common.metrics import rescore

    out, _ = demo
    for path, cell in cells(out).items():
        with np.load(out / path / "images.npz") as images:
            again = rescore(cell["identity"]["task"], dict(images))
        for name, value in cell["metrics"].items():
            if value is not None:
                assert again[name][0] == pytest.approx(value, abs=1e-12), f"{path}: {name}"


def test_run_dry_and_bad_arguments(tmp_path):
    base = [sys.executable, "-m", "backbench.common.cli.main"]
    dry = subprocess.run(
        [*base, "run", "--backbones", "scratch:resnet18_half", "--dry-run", "--seeds", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0 and dry.stdout.count("python -m") == 8
    for arguments, message in {
        ("board", str(tmp_path)): "no finished cell",
        ("run", "--backbones", "absent.pt"): "absent.pt",
    }.items():
        done = subprocess.run([*base, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done
