"""A few small pictures of a data set, so that a report can show it without the data."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from backbench.common.base.files import make_folder, write_npz
from backbench.common.data.decode import read_rgb, resize
from backbench.common.data.types import hash_order


def write_thumbnails(
    folder: Path | str,
    ids: Sequence,
    paths: Sequence[Path],
    count: int = 32,
    side: int = 224,
    frames: np.ndarray | None = None,
    boxes: Sequence[np.ndarray] | None = None,
) -> Path:
    """Write `folder/thumbnails.npz` unless it is there, and return its path. Equal inputs give equal bytes.

    A fixed choice of `count` images (by hash of the id, so a subset shows a subset), longer side at most
    `side` pixels: `ids` (m,) str, `sizes` int64 (m, 2) original width and height, `scale` float64 (m, 2)
    thumbnail by original width and height, `data` uint8 with all JPEG files one after another and `offsets`
    int64 (m + 1,) between them. `frames`: see `read_rgb`, (n, 2), for sets with boxes in pixels.
    """
    target = make_folder(folder) / "thumbnails.npz"
    if target.exists():
        return target
    chosen = np.sort(hash_order(ids)[:count])
    files, sizes, scales = [], [], []
    for i in chosen:
        image = read_rgb(paths[i], None if frames is None else frames[i])
        height, width = image.shape[:2]
        factor = min(1.0, side / max(width, height))
        small = resize(image, (max(1, round(width * factor)), max(1, round(height * factor))))
        buffer = io.BytesIO()
        Image.fromarray(small).save(buffer, "JPEG", quality=85)
        files.append(buffer.getvalue())
        sizes.append((width, height))
        scales.append((small.shape[1] / width, small.shape[0] / height))
    truth = {}
    if boxes is not None:
        unit = [1.0 if frames is None else np.tile(frames[i], 2) for i in chosen]
        shares = [np.reshape(boxes[i], (-1, 4)) / u for i, u in zip(chosen, unit)]
        truth["boxes"] = np.concatenate([np.zeros((0, 4)), *shares]).astype(np.float32)
        truth["box_offsets"] = np.cumsum([0, *map(len, shares)], dtype=np.int64)
    write_npz(
        target,
        **truth,
        ids=np.array([str(ids[i]) for i in chosen], dtype=np.str_),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        scale=np.array(scales, np.float64).reshape(-1, 2),
        data=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)], dtype=np.int64),
    )
    return target


def read_thumbnails(path: Path | str) -> dict[str, tuple[bytes, tuple[int, int], tuple[float, float]]]:
    """The thumbnails of a file by id: JPEG bytes, original (width, height), scale factors (width, height)."""
    with np.load(path) as file:
        data, offsets = file["data"].tobytes(), file["offsets"].tolist()
        sizes, scales = file["sizes"].tolist(), file["scale"].tolist()
        return {
            key: (data[offsets[i] : offsets[i + 1]], tuple(sizes[i]), tuple(scales[i]))
            for i, key in enumerate(file["ids"].tolist())
        }


def read_truth(path: Path | str) -> dict[str, np.ndarray]:
    """The true boxes of a file's thumbnails by id, float32 (k, 4) as shares; empty where it has none."""
    with np.load(path) as file:
        if "boxes" not in file:
            return {}
        boxes, offsets = file["boxes"], file["box_offsets"].tolist()
        return {key: boxes[offsets[i] : offsets[i + 1]] for i, key in enumerate(file["ids"].tolist())}
