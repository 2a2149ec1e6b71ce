"""The cache folder: results that depend on files alone, kept under a key made of those files' state."""

import os
import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, read_json, write_atomic, write_json
from backbench.common.base.locks import locked


def cache_folder(*parts: str) -> Path:
    """A folder below `$BACKBENCH_CACHE` (default `~/.cache/backbench`), created, or UserError."""
    folder = Path(os.environ.get("BACKBENCH_CACHE") or "~/.cache/backbench", *parts)
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise UserError(f"{folder}: cannot make the cache folder ({reason}); set BACKBENCH_CACHE") from None
    return folder


def file_stat(path: Path) -> os.stat_result:
    """The size and times of a file. UserError naming it when it is absent or hidden, or its name is not UTF-8."""
    need_text(path)
    try:
        return os.stat(path)  # noqa: PTH116 - Path.stat costs twice as much on a million files
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def need_text(path: Path | str) -> None:
    """UserError for a path that UTF-8 cannot hold: no result could name it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        wrong = error.object[error.start].encode("utf-8", "backslashreplace").decode()
        raise UserError(f"{shown}: the name is not UTF-8 (at {wrong}); rename it") from None


def files_state(paths: Sequence[Path]) -> str:
    """A key of the files' paths, sizes and modification times. UserError naming the first absent file."""
    sha = sha256()
    for path in paths:
        stat = file_stat(path)
        sha.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return sha.hexdigest()[:32]


def remember(what: str, paths: Sequence[Path], compute: Callable[[], Any]) -> Any:
    """`compute()`, a JSON-able value of the files `paths`, or its earlier value when none of them changed.

    `what` names the computation and its version. A file changes when its size or modification time does.
    """
    path = cache_folder("memo") / f"{digest(what, files_state(paths))}.json"
    if path.exists():
        return read_json(path)
    value = compute()
    write_json(path, value)
    return value


def need_space(folder: Path, size: int) -> None:
    """Raises UserError when the disk of `folder` has not `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: {size / 1e9:.1f} GB of decoded images do not fit there ({free / 1e9:.1f} GB are free); "
            "free some space or set BACKBENCH_CACHE"
        )


def cached_array(kind: str, key: str, write: Callable[[BinaryIO], Any]) -> np.ndarray:
    """The array that `write(file)` makes in .npy format, kept under `key`: memory-mapped and read-only.

    Of several processes one computes. Raises UserError when it cannot be written.
    """
    target = cache_folder(kind) / f"{key}.npy"
    if target.exists():
        return np.load(target, mmap_mode="r")
    with locked(target):
        if not target.exists():  # another process may have written it meanwhile
            for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of a killed run
                leftover.unlink()
            try:
                write_atomic(target, write)
            except OSError as error:
                raise UserError(
                    f"{target.parent}: cannot be written ({error.strerror}); "
                    "free some space or set BACKBENCH_CACHE"
                ) from None
    return np.load(target, mmap_mode="r")
