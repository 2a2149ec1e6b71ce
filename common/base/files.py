"""Files that are either whole or absent: written to a temporary name, synced, renamed."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from backbench.common.base.errors import UserError, is_disk_full


def file_and_choice(spec: str) -> tuple[str, str | None]:
    """`FILE#WEIGHTS` → (FILE, WEIGHTS), see `--weights`; (spec, None) for any other, or where a file is called so."""
    file, mark, choice = spec.rpartition("#")
    return (
        (file, choice) if mark and file and choice and not Path(spec).expanduser().exists() else (spec, None)
    )


def write_atomic(path: Path | str, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write(file)` on a temporary sibling of `path`, sync it and rename it to `path`.

    The temporary file is removed when writing fails, so the old `path` survives a full disk, for which UserError is
    raised whatever the writer made of it, as for a place where nothing can be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if is_disk_full(error):
            line = (
                f"{path}: no space left on its disk; free some and run again, what was there before is intact"
            )
            raise UserError(line) from None
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically; what UTF-8 cannot hold (half a surrogate pair, a byte of a file's name) is
    escaped as Python and JSON escape it."""
    write_atomic(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_npz(path: Path | str, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed npz, atomically; equal arrays give equal bytes (numpy dates members 1980)."""
    write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def user_path(text: str) -> Path:
    """A path of the command line or of a file of the user's, its `~` expanded. UserError where that is nobody's."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{text}: there is no such user; write ./{text} for a name that begins with ~"
        ) from None


def fitting_name(text: str, longest: int = 255) -> str:
    """`text` as the name of a file or folder: as it is where it fits, else its beginning and a digest of the whole."""
    data = text.encode(errors="surrogateescape")
    if len(data) <= longest:
        return text
    return f"{data[: longest - 17].decode(errors='ignore')}~{digest(text)}"


def read_json(path: Path | str) -> Any:
    """Read a JSON file. Raises UserError naming the file and the place when it is missing or malformed."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a JSON file was expected") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None


def digest(*parts: Any) -> str:
    """A 16-hex-digit SHA-256 of JSON-able values, bytes and strings: the keys and fingerprints of this project."""
    sha = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:16]


def file_digest(path: Path | str) -> str:
    """A 16-hex-digit SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def make_folder(path: Path | str, advice: str = "choose another output folder") -> Path:
    """Create a folder and prove that it can be written to. Raises UserError with the `advice` when it cannot."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); {advice}") from None
    return path
