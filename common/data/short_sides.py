"""The decoded short-side cache: a training set's pixels, small enough to keep and large enough to crop from."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL

from backbench.common.base.cache import cache_folder, cached_array, files_state, need_space
from backbench.common.base.errors import UserError, is_disk_full
from backbench.common.base.files import digest, read_json, write_json
from backbench.common.base.locks import locked
from backbench.common.base.progress import progress
from backbench.common.data.decode import read_headers, read_rgb, resize, short_size

BLOCK = 1024  # images between two syncs: what a kill can cost


class ShortSides:
    """Decoded images in one memory-mapped file; item i is uint8 (h, w, 3), read-only."""

    def __init__(self, pixels: np.ndarray, sizes: np.ndarray) -> None:
        self.pixels, self.sizes = pixels, sizes.tolist()
        self.starts = _starts(sizes).tolist()

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        width, height = self.sizes[index]
        return self.pixels[self.starts[index] : self.starts[index + 1]].reshape(height, width, 3)


def short_sides(paths: Sequence[Path], side: int, workers: int | None = None) -> ShortSides:
    """All images decoded by `read_rgb` and shrunk (antialiased, as PIL) until the shorter side is `side`.

    An image whose shorter side is not above `side` is kept as it is. The file lies in the cache folder under the
    files' state, `side` and Pillow's version. A killed build continues where it was last synced; of several
    processes one builds. Raises UserError for an image that cannot be decoded and for too small a disk.
    """
    if not paths:
        raise UserError("no image to decode")
    key = digest("short 1", files_state(paths), side, PIL.__version__)
    sizes = cached_array("short", f"{key}-sizes", lambda file: np.save(file, _sizes(paths, side)))
    target = cache_folder("short") / f"{key}.u8"
    with locked(target):
        if not target.exists():
            try:
                _build(target, paths, sizes, workers or os.cpu_count() or 1)
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise UserError(
                    f"{target.parent}: no space left on its disk; free some and run again, it continues there"
                ) from None
    return ShortSides(np.asarray(np.memmap(target, np.uint8, "r")), sizes)


def _sizes(paths: Sequence[Path], side: int) -> np.ndarray:
    """int32 (n, 2): width and height that each image will have, from the headers alone."""
    sizes = np.empty((len(paths), 2), np.int32)
    for i, (width, height, orientation) in enumerate(read_headers(paths).tolist()):
        if not width or not height:
            raise UserError(f"{paths[i]}: not a readable image; repair or remove it")
        if orientation >= 5:
            width, height = height, width
        sizes[i] = (width, height) if min(width, height) <= side else short_size(width, height, side)
    return sizes


def _starts(sizes: np.ndarray) -> np.ndarray:
    """int64 (n + 1,): where each image begins in the file, and its end."""
    return np.concatenate([[0], np.cumsum(sizes.astype(np.int64).prod(1) * 3)])


def _build(target: Path, paths: Sequence[Path], sizes: np.ndarray, workers: int) -> None:
    part, state = target.with_suffix(".part"), target.with_suffix(".json")
    starts = _starts(sizes)
    done = read_json(state)["images"] if part.exists() and state.exists() else 0
    need_space(target.parent, int(starts[-1] - starts[done]))
    with (
        part.open("r+b" if done else "wb") as file,
        ThreadPoolExecutor(workers) as pool,
        progress(desc="decoding", total=len(paths), initial=done, unit="img") as bar,
    ):

        def put(i: int) -> None:
            size = tuple(sizes[i].tolist())
            image = resize(read_rgb(paths[i]), size)
            # pwrite, because a memory map on a full disk ends the process
            _write_at(file.fileno(), memoryview(np.ascontiguousarray(image)).cast("B"), int(starts[i]))

        for first in range(done, len(paths), BLOCK):
            stop = min(first + BLOCK, len(paths))
            for _ in pool.map(put, range(first, stop)):
                bar.update()
            os.fsync(file.fileno())
            write_json(state, {"images": stop})
    part.replace(target)
    state.unlink()


def _write_at(file: int, data: memoryview, start: int) -> None:
    while len(data):  # a nearly full disk takes a part first
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written
