"""Reproduce one finished cell: its own command in a scratch folder, the new numbers beside the old."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.base.files import make_folder, read_json
from backbench.common.grid.display import last_lines
from backbench.common.grid.facts import child_env, python_command
from backbench.common.run.keys import code_hash


def find_cell(target: str, results: Path) -> Path:
    """The cell folder that `target` names: a path, or TASK/MODEL/BACKBONE/seedK (any end of it) in `results`.

    Raises UserError when it names none, or several: they are listed.
    """
    for folder in (Path(target), results / target):
        if (folder / "cell.json").exists():
            return folder
    found = []
    for path in sorted(results.rglob("cell.json")):
        identity = read_json(path)["identity"]
        where = [identity[k] for k in ("data", "task", "model", "recipe", "backbone")]
        names = ["/".join([*where, f"seed{identity['seed']}"])]
        names.append(
            "/".join([identity["task"], identity["model"], identity["backbone"], f"seed{identity['seed']}"])
        )
        if any(f"/{name}".endswith(f"/{target.strip('/')}") for name in names):
            found.append(path.parent)
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{target}: no such cell in {results}; `backbench ls {results}` lists them")
    listed = ", ".join(str(folder) for folder in found[:4])
    raise UserError(f"{target}: names {len(found)} cells ({listed}); give one of these folders")


def rerun_cell(folder: Path, keep: Path | None = None) -> tuple[list[str], bool]:
    """Run a cell's command again, apart, with its number of threads: (lines to print, whether all is equal).

    `keep`: a folder for the new run, else it is removed. Raises UserError when the cell does not know its command, or
    when that fails.
    """
    old = read_json(folder / "cell.json")
    provenance = read_json(folder / "provenance.json")
    command, place = provenance.get("command"), provenance.get("folder")
    if not command:
        raise UserError(f"{folder}: does not say by which command it was made; nothing to run again")
    scratch = Path(tempfile.mkdtemp(prefix="backbench-rerun-")) if keep is None else make_folder(keep)
    try:
        threads = old["device"].get("threads")
        env = child_env(**({"OMP_NUM_THREADS": str(threads)} if threads else {}))
        log = scratch / "rerun.log"
        with log.open("wb") as out:
            whole = python_command(_into(command, scratch))
            done = subprocess.run(
                whole, env=env, cwd=_folder(place), stdout=out, stderr=subprocess.STDOUT, check=False
            )
        path = next(iter(sorted(scratch.rglob("cell.json"))), None)
        if done.returncode or path is None:
            raise UserError(f"{' '.join(command)}: exit code {done.returncode}: {last_lines(log, 1)}")
        return compare(old, read_json(path))
    finally:
        if keep is None:
            shutil.rmtree(scratch, ignore_errors=True)


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """A line a metric (before, now, difference; fractions × 100), what else differs, and whether all is equal."""
    lines = [f"{'':>14} {'before':>12} {'now':>12} {'difference':>12}"]
    equal = True
    for name in sorted(old["metrics"].keys() | new["metrics"].keys()):
        before, now = old["metrics"].get(name), new["metrics"].get(name)
        equal &= before == now
        values = [f"{'n/a' if v is None else f'{100 * v:.6f}':>12}" for v in (before, now)]
        gap = "n/a" if None in (before, now) else f"{100 * (now - before):.6g}"
        lines.append(f"{name:>14} {' '.join(values)} {gap:>12}")
    for file in (
        "images.npz",
        *(f for f in sorted(old["files"]) if f.startswith(("predictions", "scoremaps"))),
    ):
        same = old["files"].get(file) == new["files"].get(file)
        equal &= same
        lines.append(f"{file}: {'the same bytes' if same else 'other bytes'}")
    for name in ("keys", "device", "train_precision", "eval_precision"):
        before, now = (cell[name] if name in cell else cell["precision"] for cell in (old, new))
        if before != now:
            lines.append(f"{name}: {before} (now {now})")
    if old["code"] != new["code"]:
        lines.append(f"code: {old['code']} (now {code_hash(new['identity']['task'])})")
    lines.append("reproduced exactly" if equal else "not the same numbers")
    return lines, equal


def _into(command: list[str], out: Path) -> list[str]:
    """The command with another --out and without what would throw the run away."""
    made, parts = [], iter(command)
    for part in parts:
        if part == "--out":
            next(parts, None)
        elif part != "--restart" and not part.startswith("--out="):
            made.append(part)
    return [*made, "--out", str(out)]


def _folder(place: str | None) -> str | None:
    return place if place and Path(place).is_dir() else None
