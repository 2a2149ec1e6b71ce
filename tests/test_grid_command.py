"""One real cell through `backbench run` and `rerun`; the schema of cell.json, and frozen cells."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

from backbench.common.base.errors import UserError
from backbench.common.base.files import file_digest
from backbench.common.board.cells import load_cells
from backbench.common.grid import rerun
from backbench.common.run.keys import ROOT


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A grid of one smoke cell run by the command, from a TOML file."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "grid.toml").write_text(
        'recipe = "smoke"\ntasks = ["wsol"]\nout = "results"\n[backbones]\nmine = "scratch:resnet18_half"\n'
    )
    done = backbench("run", folder / "grid.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def backbench(*words, **more):
    command = [sys.executable, "-m", "backbench.common.cli.main", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, **more)


def test_a_grid_of_toml_checks_runs_and_ends_with_the_board(real):
    folder, printed = real
    for part in (
        "data: wsol scenes",
        "weights: scratch:",
        "disk: up to",
        "time: unknown",
        "1 cells computed",
        "CAM",
    ):
        assert part in printed
    (cell,) = load_cells(folder)
    assert (cell.identity.backbone, cell.identity.group) == ("mine", "mine")
    again = backbench("run", folder / "grid.toml")
    assert again.returncode == 0 and "0 cells computed, 1 finished before" in again.stdout
    for target in (folder / "grid.toml", folder / "results"):
        status = backbench("status", target)
        assert status.returncode == 0 and status.stdout.startswith(("1 cells: 1 done", "code drifted")), (
            status
        )


def test_rerun_reproduces_the_cell_exactly(real):
    folder, _ = real
    before = file_digest(next(folder.rglob("cell.json")))
    done = backbench("rerun", "wsol/cam/mine/seed0", "--results", folder / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("reproduced exactly") and "Top-1 Loc" in done.stdout
    assert "images.npz: the same bytes" in done.stdout
    assert file_digest(next(folder.rglob("cell.json"))) == before
    for words, message in ((["wsol/cam/none/seed0"], "no such cell"), ([], "the following arguments")):
        wrong = backbench("rerun", *words, "--results", folder / "results")
        assert wrong.returncode == 2 and message in wrong.stderr


def test_rerun_shows_a_difference_and_refuses_what_is_not_unique(real, tmp_path):
    folder, _ = real
    (cell,) = load_cells(folder)
    old = json.loads((cell.folder / "cell.json").read_text())
    new = json.loads(json.dumps(old))
    new["metrics"]["Top-1 Loc"] += 0.25
    lines, equal = rerun.compare(old, new)
    assert (
        not equal and any(line.split()[-1] == "25" for line in lines) and lines[-1] == "not the same numbers"
    )
    for name in ("a", "b"):
        shutil.copytree(cell.folder, tmp_path / name / "seed0")
    with pytest.raises(UserError, match="names 2 cells"):
        rerun.find_cell("cam/mine/seed0", tmp_path)
    (tmp_path / "a" / "seed0" / "provenance.json").write_text("{}")
    with pytest.raises(UserError, match="does not say by which command"):
        rerun.rerun_cell(tmp_path / "a" / "seed0")


def test_results_copied_from_another_machine_are_done_there(real, tmp_path):
    folder, _ = real
    shutil.copytree(folder / "results" / "scenes-smoke", tmp_path / "results" / "scenes-smoke")
    shutil.copy(folder / "grid.toml", tmp_path)
    status = backbench("status", tmp_path / "grid.toml")
    assert status.stdout.splitlines()[-1].startswith("1 cells: 1 done"), status


EXAMPLES = sorted((Path(__file__).parent / "cells").glob("*/cell.json"))


def problems(value, schema, where="cell") -> list[str]:
    """What of a JSON value breaks a schema, of the few words that ours uses."""
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
    }
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = [
        number if w == "number" else isinstance(value, types[w]) and (w != "integer" or number)
        for w in wanted
    ]
    if wanted and not any(fits):
        return [f"{where}: {value!r} is no {wanted}"]
    found = [f"{where}: {value!r} is not {schema['const']}"] if value != schema.get("const", value) else []
    if isinstance(value, dict):
        found += [f"{where}: no {key}" for key in schema.get("required", []) if key not in value]
        ways = schema.get("anyOf", [])
        if ways and all(problems(value, way, where) for way in ways):
            found.append(f"{where}: none of {ways}")
        rest = schema.get("additionalProperties", True)
        for key, inner in value.items():
            inner_schema = schema.get("properties", {}).get(key, rest)
            if inner_schema is False:
                found.append(f"{where}: {key} is unknown")
            elif isinstance(inner_schema, dict):
                found += problems(inner, inner_schema, f"{where}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        found += [p for n, item in enumerate(value) for p in problems(item, schema["items"], f"{where}[{n}]")]
    return found


def schema():
    return json.loads((ROOT / "common" / "board" / "cell.schema.json").read_text())


def test_a_new_cell_follows_the_schema_file(real):
    folder, _ = real
    cell = json.loads(next(folder.rglob("cell.json")).read_text())
    assert problems(cell, schema()) == []
    assert problems({**cell, "metrics": {"a": "b"}}, schema()) == [
        "cell.metrics.a: 'b' is no ['number', 'null']",
    ]
    assert problems({k: v for k, v in cell.items() if k != "eval_precision"}, schema()) != []
    del cell["identity"]["seed"]
    assert problems(cell, schema()) == ["cell.identity: no seed"]


def test_frozen_cells_stay_readable():
    """Cells of every schema version that was ever written, as they were written; never change these files."""
    from backbench.common.metrics import rescore

    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        assert problems(json.loads(path.read_text()), schema()) == []
        (cell,) = load_cells(path.parent)
        again = rescore(cell.identity.task, cell.images())
        for name, value in cell.metrics.items():
            assert value is None or again[name][0] == pytest.approx(value, abs=1e-12)
