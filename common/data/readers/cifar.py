"""CIFAR-10 and CIFAR-100 in their published files: the python version (pickles) and the binary version.

A pickle can run code, so these are read by an Unpickler that knows lists, dicts, texts, numbers and plain uint8 arrays,
and refuses everything else.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.cache import remember
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest
from backbench.common.data.layout import found, need_folder, read_lines, short_name
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import ImageSet

SIDE = 32
IMAGE_BYTES = 3 * SIDE * SIDE  # a red, a green and a blue plane


@dataclass(frozen=True)
class Files:
    """Where one published version keeps its parts; `labels`: how many label bytes a record of it begins with."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    labels: int = 0  # 0: the python version


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
VERSIONS = {
    "cifar10": (
        Files("cifar-10-batches-py", BATCHES, ("test_batch",), "batches.meta"),
        Files(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in BATCHES),
            ("test_batch.bin",),
            "batches.meta.txt",
            labels=1,
        ),
    ),
    "cifar100": (
        Files("cifar-100-python", ("train",), ("test",), "meta"),
        # coarse label, fine label
        Files("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", labels=2),
    ),
}
PUBLISHED = {"train": 50_000, "test": 10_000}  # images, of both sets


def read_cifar(spec: DataSpec) -> tuple[ImageSet, ImageSet]:
    """Read `cifar10:DIR` or `cifar100:DIR` as (train, test): pixels uint8 (n, 32, 32, 3) RGB, fine labels.

    DIR is the folder of the published files or its parent. Ids are "train/00000" …, in the published order;
    `paths` name the file an image stands in. The fingerprint is of pixels and labels: both versions have the same.
    Raises UserError naming a file that is missing, cut short or something else.
    """
    folder, files = locate(spec)
    classes = _class_names(folder / files.names, files)
    name = short_name(spec.options.get("name", spec.kind))
    train, test = (_read_part(folder, files, part, name, classes) for part in ("train", "test"))
    return train, test


def locate(spec: DataSpec) -> tuple[Path, Files]:
    """The folder that holds the set's files, and which version they are. Raises UserError where there is none."""
    versions = VERSIONS[spec.kind]
    layout = " or ".join(f"{files.folder}/" for files in versions)
    root = need_folder(spec.path, layout)
    for kind, each in VERSIONS.items():
        for files in each:
            for folder in (root / files.folder, root):
                # names of the python version are common words ("train"): its folder's name or its meta file tell
                there = [(folder / name).is_file() for name in (*files.train, *files.test, files.names)]
                if folder.is_dir() and (folder.name == files.folder or all(there)):
                    if kind == spec.kind:
                        return folder, files
                    if not any((root / files.folder).is_dir() for files in versions):
                        raise UserError(f"{folder}: is {kind}, not {spec.kind}; write {kind}:{spec.path}")
    raise UserError(f"{root}: no {spec.kind} ({found(root)}); expected {layout} of the published archive")


def _class_names(path: Path, files: Files) -> list[str]:
    if files.labels:
        names = [line for line in read_lines(path) if line]
    else:
        meta = _unpickle(path)
        names = meta.get("fine_label_names", meta.get("label_names"))
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(f"{path}: holds no list of class names; unpack the published archive again")
    return names


def _read_part(folder: Path, files: Files, part: str, name: str, classes: list[str]) -> ImageSet:
    paths = [folder / file for file in getattr(files, part)]
    read = _read_binary if files.labels else _read_pickle
    pixels, labels = zip(*(read(path, files, len(classes)) for path in paths))
    owners = [path for path, some in zip(paths, labels) for _ in some]
    pixels, labels = np.concatenate(pixels), np.concatenate(labels)
    # planes to RGB pixels
    pixels = np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    key = remember(
        "cifar 1",
        [*paths, folder / files.names],
        lambda: digest("cifar", classes, pixels.tobytes(), labels.astype("<i8").tobytes()),
    )
    report = []
    if len(labels) != PUBLISHED[part]:
        report = [
            f"{len(labels)} images; the published {part} part has {PUBLISHED[part]} (first: {paths[0].name})"
        ]
    return ImageSet(
        name,
        classes,
        [f"{part}/{number:05d}" for number in range(len(labels))],
        owners,
        labels,
        fingerprint=key,
        report=report,
        pixels=pixels,
    )


def _read_binary(path: Path, files: Files, classes: int) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(_bytes(path), np.uint8)
    record = files.labels + IMAGE_BYTES
    if not len(data) or len(data) % record:
        raise UserError(
            f"{path}: {len(data)} bytes are no whole number of {record}-byte records: cut short, or another file; "
            "unpack the published archive again"
        )
    records = data.reshape(-1, record)
    return records[:, files.labels :], _labels(path, records[:, files.labels - 1], classes)


def _read_pickle(path: Path, files: Files, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(path)
    pixels, labels = content.get("data"), content.get("fine_labels", content.get("labels"))
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.ndim != 2
        or pixels.shape[1] != IMAGE_BYTES
        or not len(pixels)
    ):
        raise UserError(
            f"{path}: has no 'data' of n × {IMAGE_BYTES} uint8; unpack the published archive again"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(
            f"{path}: has no list of whole numbers 'labels' or 'fine_labels'; not a batch of CIFAR"
        )
    if len(labels) != len(pixels):
        raise UserError(f"{path}: {len(pixels)} images but {len(labels)} labels; unpack the archive again")
    return pixels, _labels(path, np.array(labels), classes)


def _labels(path: Path, labels: np.ndarray, classes: int) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise UserError(
            f"{path}: image {wrong} has label {labels[wrong]}, there are {classes} classes; damaged or of another set"
        )
    return labels.astype(np.int64)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        there = found(path.parent) if path.parent.is_dir() else "no such folder"
        raise UserError(f"{path}: no such file ({there}); unpack the published archive again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


class _Refused(Exception):
    """A pickle asks for something that batches of CIFAR do not hold."""


class _Dtype:
    """Stands for `numpy.dtype` in a pickle: only uint8 is believed."""

    def __init__(self, name: str = "", *_: Any) -> None:
        if name not in ("u1", "uint8", "|u1"):
            raise _Refused(f"an array of {name!r}")

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment mean nothing to a byte


class _Array:
    """Stands for an array in a pickle: collects shape and bytes, so that no code of numpy sees them unchecked."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise _Refused("an array of something else than bytes")
        self.value = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            "_reconstruct": lambda *_: _Array(),
            "ndarray": _Array,
            "dtype": _Dtype,
            "encode": lambda text, codec: text.encode("latin1"),  # how Python 3 writes bytes in protocol 2
        }
        modules = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs"}
        if module not in modules or name not in known:
            raise _Refused(f"{module}.{name}")
        return known[name]


def _unpickle(path: Path) -> dict[str, Any]:
    data = _bytes(path)
    try:
        # the published files are of Python 2: its byte strings come as latin1 text
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except _Refused as error:
        raise UserError(
            f"{path}: holds {error}, which published files do not and which could run code; unpack the archive again"
        ) from None
    except Exception as error:  # a damaged pickle raises almost anything
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: cut short or no pickle ({reason}); unpack the published archive again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a batch of CIFAR")
    return {key: value.value if isinstance(value, _Array) else value for key, value in content.items()}
