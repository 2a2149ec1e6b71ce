"""What a plan needs to know of data, weights, recipes and code, remembered as long as their files stay as they are.

So `backbench status` reads no data set, loads no weights and imports no torch unless something changed. A data set's
state is its files' names and sizes, with the time of those that are not images; what is inside an image is in no key.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from backbench.common.base.cache import cache_folder
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, file_and_choice, read_json, user_path, write_json
from backbench.common.data.layout import EXTENSIONS
from backbench.common.data.registry import parse_data
from backbench.common.run.keys import CHECKOUT, ROOT, code_files, code_hash
from backbench.common.run.tasks import READERS

TORCHRUN = (  # what torchrun tells its processes; a cell that finds it would wait for the others
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)
LIBRARIES = ("torchvision", "timm", "scratch")

READ_RECIPES = """
import importlib, json, sys
import backbench.common
from backbench.common.base.errors import run_main
from backbench.common.base.recipe import STAGES, label, override
from backbench.common.base.errors import UserError

def main():
    found = []
    for room, model, name, settings, fixed in json.load(sys.stdin):
        recipes = importlib.import_module(f"backbench.{room}.recipes").RECIPES
        recipes = recipes.get(model, recipes)
        if name not in recipes:
            raise UserError(f"--recipe {name}: {room} has {', '.join(recipes)}")
        try:
            recipe = override(recipes[name], [*settings, *fixed])
        except UserError as error:
            raise UserError(f"{model or room}: {error}") from None
        found.append({
            "fields": {stage: recipe.stage_fields(stage) for stage in STAGES},
            "label": label(name, settings, recipe),
        })
    print(json.dumps(found))

run_main(main)
"""


class Facts:
    """A memory of facts on disk, each under a digest of the state it was computed from; `check` recomputes all."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or cache_folder("grid") / "facts.json"
        self.known: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # a damaged memory is no memory
            self.known = read_json(self.file)
        self.now: dict[str, Any] = {}  # of this process

    def get(self, *state: Any, compute: Callable[[], Any]) -> Any:
        """The fact of this state, computed when it is new, remembered at once."""
        key = digest(*state)
        if key not in self.now:
            if key not in self.known:
                self.known[key] = compute()
                with contextlib.suppress(
                    OSError, UserError
                ):  # a cache that cannot be written costs time alone
                    write_json(self.file, self.known)
            self.now[key] = self.known[key]
        return self.now[key]

    @functools.cached_property
    def reading(self) -> str:
        """The state of the code that reads data and draws the embedded world."""
        return _state(sorted((ROOT / "common" / "data").rglob("*.py")))

    @functools.cached_property
    def loading(self) -> str:
        """The state of the code that reads checkpoints."""
        return _state(sorted((ROOT / "common" / "backbones").glob("*.py")))

    def data(self, room: str, spec: str, limit: int = 0, val_share: float = 0.0) -> dict[str, Any]:
        """name, and fingerprint and number of images of the training and the test part, read and checked.

        Raises UserError as the room's reader does.
        """
        state, _ = self._files(spec)

        def read() -> dict[str, Any]:
            import backbench.common.data

            train, test = getattr(backbench.common.data, READERS[room])(spec, limit or None)
            name = test.name
            if val_share:
                from backbench.common.run.transfer import hold_out

                train, test = hold_out(train, val_share)
            parts = {"train": train.fingerprint, "test": test.fingerprint}
            return {"name": name, **parts, "train_images": len(train), "test_images": len(test)}

        return self.get("data", room, spec, limit, val_share, state, self.reading, compute=read)

    def newest_image(self, spec: str) -> tuple[float, str]:
        """When the image of a data spec that was written last was, in seconds, and its path; (0, "") without images."""
        return self._files(spec)[1]

    @functools.cache  # noqa: B019 - as long as the process
    def _files(self, spec: str) -> tuple[str, tuple[float, str]]:
        """The state of a data spec's files, and the newest image among them."""
        parsed = parse_data(spec)
        if parsed.kind == "scenes":
            return os.environ.get("BACKBENCH_CACHE", ""), (0.0, "")
        values = [v for v in (parsed.path, *parsed.options.values()) if v]
        bases = [Path(), Path(parsed.path)] if parsed.path else [Path()]
        found = [base / v for v in values for base in bases]
        trees = [_tree(path) for path in dict.fromkeys(found) if path.exists()]
        return digest(*(state for state, _ in trees)), max((newest for _, newest in trees), default=(0.0, ""))

    def backbone(self, spec: str) -> dict[str, Any]:
        """label, group, method, arch, seed of pretraining, fingerprint and megabytes of a backbone, loaded and checked.

        Raises UserError as `load_backbone` does.
        """

        def load() -> dict[str, Any]:
            from backbench.common.backbones.load import load_backbone

            made = load_backbone(spec)
            return {
                "label": made.name,
                "group": made.group,
                "method": made.method,
                "arch": made.arch,
                "pretrain_seed": made.pretrain_seed,
                "fingerprint": made.fingerprint,
                "scratch": made.scratch,
                "megabytes": sum(t.nbytes for t in made.trunk.state_dict().values()) / 2**20,
            }

        file = backbone_file(spec)
        if file is not None and not file.exists():
            raise UserError(f"{file}: no such backbone file")
        state = _state([file]) if file else ""
        return self.get("backbone", spec, state, self.loading, compute=load)

    def recipes(self, asked: Sequence[tuple[str, str, str, tuple[str, ...], tuple[str, ...]]]) -> list[dict]:
        """Of (room, model, recipe, settings, fixed settings): its fields by stage, and its label without the fixed.

        One process imports the rooms' recipes for all that are not remembered. Raises UserError for an unknown recipe
        or setting.
        """
        keys = [("recipe", *map(str, one), _state(recipe_files(one[0]))) for one in asked]
        missing = [one for one, key in zip(asked, keys) if digest(*key) not in self.known]
        if missing:
            found = iter(_read_recipes(list(dict.fromkeys(missing))))
            answers = {one: next(found) for one in dict.fromkeys(missing)}
            for one, key in zip(asked, keys):
                if one in answers:
                    self.get(*key, compute=functools.partial(answers.get, one))
        return [self.get(*key, compute=dict) for key in keys]

    def code(self, room: str) -> str:
        """The hash of the code that computes a room's cells."""
        return self.get("code", room, _state(code_files(room)), compute=lambda: code_hash.__wrapped__(room))


def backbone_file(spec: str) -> Path | None:
    """The file a backbone spec names, or None: a library's model, random weights."""
    return None if spec.partition(":")[0] in LIBRARIES else user_path(file_and_choice(spec)[0])


def recipe_files(room: str) -> list[Path]:
    """The code that a room's recipes are made of."""
    shared = [ROOT / "common" / "base" / "recipe.py", *sorted((ROOT / "common" / "classify").glob("*.py"))]
    return [*shared, ROOT / room / "recipes.py"]


def child_env(**more: str) -> dict[str, str]:
    """The environment in which a cell's process finds this project, alone (nothing of a torchrun), and writes UTF-8."""
    roots = [str(ROOT)] if CHECKOUT else []
    path = os.pathsep.join(filter(None, [*roots, os.environ.get("PYTHONPATH")]))
    kept = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("TORCHELASTIC_")}
    return {**kept, **({"PYTHONPATH": path} if path else {}), "PYTHONIOENCODING": "utf-8", **more}


def python_command(command: Sequence[str]) -> list[str]:
    """`detection.finetune --seed 1` as a command line of this interpreter; no file of the working folder is read."""
    module, *arguments = command
    return [sys.executable, "-P", "-u", "-m", f"backbench.{module}", *arguments]


def _read_recipes(asked: list) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", READ_RECIPES],
        input=json.dumps(asked),
        env=child_env(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise UserError(
            (done.stderr.strip().splitlines() or ["the recipes cannot be read"])[-1].removeprefix("error: ")
        )
    return json.loads(done.stdout)


def _state(paths: Iterable[Path]) -> str:
    """Names, sizes and times of files."""
    stats = [(str(path), path.stat()) for path in paths]
    return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def _tree(path: Path) -> tuple[str, tuple[float, str]]:
    """The state of a file, or of all below a folder, and the newest image with its time in seconds.

    The state is every name and size, and the time of those that are not images: a copy of an image is the same image.
    """
    if path.is_file():
        return _state([path.absolute()]), (0.0, "")
    lines, folders, newest, seen = [], [str(path.absolute())], (0.0, ""), set()
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                try:
                    stat = entry.stat()
                except OSError:  # a link to nothing: its reader will say so
                    lines.append(entry.path)
                    continue
                if entry.is_dir():
                    if (
                        not entry.is_symlink() or (stat.st_dev, stat.st_ino) not in seen
                    ):  # links may go in circles
                        folders.append(entry.path)
                    seen.add((stat.st_dev, stat.st_ino))
                    continue
                if entry.name.lower().endswith(EXTENSIONS):
                    lines.append(f"{entry.path} {stat.st_size}")
                    newest = max(newest, (stat.st_mtime, entry.path))
                else:
                    lines.append(f"{entry.path} {stat.st_size} {stat.st_mtime_ns}")
    return digest("\n".join(lines)), newest
