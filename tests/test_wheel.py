"""The built wheel, installed where somebody's own `common/` and `detection/` stand, in a repository of theirs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the checkout's files, built from a copy: setuptools writes beside them."""
    source, out = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "tests", "results", "docs", "runs", "demo", "build", "*.egg-info"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        out,
        source,
    ]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def project(wheel, tmp_path_factory):
    """A repository with packages of the same names, and an environment that has the wheel; its `bin` folder."""
    folder = tmp_path_factory.mktemp("theirs")
    for name in ("common", "detection", "wsol"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('somebody else')\n", encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    paths = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    site = Path(paths.stdout.strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*install, "--force-reinstall", wheel], check=True)
    return folder, environment / "bin", site


def run(folder: Path, *command: str | Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_holds_backbench_alone(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"backbench"}
    for name in ("common/report/report.html", "common/report/report.css", "common/board/cell.schema.json"):
        assert f"backbench/{name}" in names


def test_the_smoke_path_runs_beside_folders_of_the_same_names(project):
    folder, binaries, site = project
    options = (
        "--backbones",
        "scratch:resnet18_half",
        "--tasks",
        "wsol",
        "--recipe",
        "smoke",
        "--limit",
        "12",
    )
    printed = run(folder, binaries / "backbench", "run", *options)
    assert "1 cell" in printed and "CAM" in printed
    cell = next((folder / "results").rglob("cell.json"))
    made = json.loads((cell.parent / "provenance.json").read_text(encoding="utf-8"))
    assert made["git"] == "not a git checkout"  # theirs is not ours
    where = run(folder, binaries / "python", "-P", "-c", "import backbench.detection as d; print(d.__path__)")
    assert str(site) in where
    run(folder, binaries / "python", "-P", "-m", "backbench.detection.finetune", "--help")
