"""Pictures that a user names, and pictures written for a user."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from backbench.common.base.errors import UserError
from backbench.common.base.files import write_atomic
from backbench.common.data.check import check_images
from backbench.common.data.decode import resize
from backbench.common.data.layout import Report, found, list_folder


def find_pictures(given: Sequence[Path]) -> list[Path]:
    """Picture files, and the pictures directly in folders, in order; unreadable ones of a folder are left out, aloud.

    Raises UserError for a path that is neither file nor folder, a folder without a readable picture, and a named file
    that is none.
    """
    given = [path.expanduser() for path in given]
    paths = [path for one in given for path in _expand(one)]
    bad = {paths[i] for i in check_images(paths, skip_bad=True)}
    for path in sorted(bad):
        if path in given or len(bad) == len(set(paths)):
            raise UserError(f"{path}: not a readable image, or cut short; leave it out")
        print(f"left out: {path}: not a readable image, or cut short", file=sys.stderr)
    return [path for path in paths if path not in bad]


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        inside = list_folder(path, path, Report())[0]
        if not inside:
            raise UserError(f"{path}: no picture right in this folder ({found(path)})")
        return inside
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return [path]


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A name to write each picture under: its own with .jpg; of equal ones the later get a number."""
    names: dict[str, Path] = {}
    for path in paths:
        name, number = f"{path.stem}.jpg", 1
        while name in names:
            number += 1
            name = f"{path.stem}-{number}.jpg"
        names[name] = path
    return list(names)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) with its longer side at most `side` pixels."""
    height, width = image.shape[:2]
    factor = min(1.0, side / max(width, height))
    return resize(image, (max(1, round(width * factor)), max(1, round(height * factor))))


def write_jpeg(path: Path, picture: Image.Image | np.ndarray, quality: int = 90) -> None:
    """Write a JPEG, whole or not at all."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))
