"""The walls: who may import whom, and where the two slow-moving libraries may stand."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("pretrain", "detection", "captioning", "wsol")
FLOORS = (  # of common/, lowest first
    *("base", "metrics", "data", "engine", "backbones", "run", "classify", "board", "report", "grid", "cli"),
)
FILES = [path for room in (*TASKS, "common") for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("backbench.").split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.removeprefix("backbench.").split(".")[0])
    return names


def modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it; of names imported from one, the module."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_project_is_imported_as_backbench(path):
    """A folder `common` or `detection` of somebody else's may stand on the path."""
    assert not {name.split(".")[0] for name in modules(path)} & {*TASKS, "common"}


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_imports_a_higher_one(floor):
    higher = FLOORS[FLOORS.index(floor) + 1 :]
    for path in (ROOT / "common" / floor).rglob("*.py"):
        names = {name.split(".")[2] for name in modules(path) if name.startswith("backbench.common.")}
        assert not names & set(higher), path


def test_every_folder_is_packed():
    """The wheel's list of packages names every folder with Python files."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in FILES}
    assert sorted(packages) == sorted("backbench." + folder.replace("/", ".") for folder in folders)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_common_and_themselves(path):
    room = path.relative_to(ROOT).parts[0]
    assert not imported(path) & (set(TASKS) - {room})


def test_slow_libraries_stand_behind_a_fence():
    assert [str(p.relative_to(ROOT)) for p in FILES if "mmengine" in imported(p)] == [
        "common/engine/optim.py"
    ]
    assert len([p for p in FILES if "albumentations" in imported(p)]) <= 3
    assert len([p for p in FILES if "pycocoevalcap" in imported(p)]) <= 1


def test_text_is_utf8_whatever_the_locale():
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        if not re.search(r"\bopen\(|(read|write)_text\(|text=|newlines=", source):
            continue
        for call in ast.walk(ast.parse(source)):
            if isinstance(call, ast.Call) and reads_or_writes_text(call):
                assert "encoding" in {k.arg for k in call.keywords}, f"{path}:{call.lineno}: no encoding="


def reads_or_writes_text(call: ast.Call) -> bool:
    """Whether a call opens a file or a pipe as text, by its name and its mode."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)
    if name in ("run", "Popen", "check_output") and owner == "subprocess":
        return any(k.arg in ("text", "universal_newlines") for k in call.keywords)
    if name != "open" or owner in ("gzip", "Image", "os", "tarfile", "zipfile"):
        return False
    place = call.args[isinstance(call.func, ast.Name) :]
    modes = [*place[:1], *(k.value for k in call.keywords if k.arg == "mode")]
    return all(isinstance(mode, ast.Constant) and "b" not in str(mode.value) for mode in modes)


def test_no_file_holds_a_path_of_one_machine():
    for path in FILES:
        assert not re.search(r"[\"'](/home|/root|/Users|/tmp)/", path.read_text(encoding="utf-8")), path
