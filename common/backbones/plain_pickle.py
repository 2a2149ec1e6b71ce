"""Pickles of plain objects and weights, read without running code: PyTorch files of any protocol, numpy arrays.

`torch.load(weights_only=True)` reads pickle protocols 2 and 3 alone, and no numpy array. This reader takes protocols 0
to 5, Python 2's files and `pickle.dump`'s. It imports nothing that a file names: a name means what `_TABLE` says or is
refused, and what the table holds builds tensors, arrays and plain containers and cannot be altered by a file.
"""

import argparse
import collections
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of what torch.save wrote before PyTorch 1.6
STORAGES = {  # class of a storage: its elements
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "QUInt4x2": torch.uint8,
    "QUInt2x4": torch.uint8,
    "Untyped": torch.uint8,
}


class RefusedName(pickle.UnpicklingError):
    """A file names an object that is not in the table; the message is that name."""


@dataclass(frozen=True)
class OddTensor:
    """Stands for a tensor that no network here can take."""

    kind: str


class Array:
    """A numpy array of a file, as a tensor; None for texts, which are no tensors."""

    tensor: torch.Tensor | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self._fill(raw, dtype, shape, "F" if fortran else "C")

    def _fill(self, raw: bytes | str, dtype: "_Dtype", shape: tuple[int, ...], order: str) -> None:
        array = np.frombuffer(_bytes(raw), dtype.numpy()).reshape(shape, order=order)
        if array.dtype.kind not in "SU":
            self.tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def read_plain(path: Path) -> Any:
    """The content of a torch.save file or of a pickle. Raises RefusedName, and whatever a damaged file may raise."""
    if zipfile.is_zipfile(path):
        return _read_zip(path)
    with path.open("rb") as file:
        if file.peek(1)[:1] not in (
            b"\x80",
            b"(",
            b"}",
            b"]",
        ):  # protocol 2 and later; dicts and lists of 0 and 1
            raise ValueError("no pickle and no whole zip archive")
        return _read_stream(file, path.stat().st_size)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        root = next(n for n in archive.namelist() if n.endswith("/data.pkl"))[: -len("data.pkl")]
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        storages: dict[str, bytearray] = {}

        def storage(saved: tuple) -> _Storage:
            _, dtype, key, *_ = saved
            if key not in storages:
                entry = archive.getinfo(f"{root}data/{key}")
                storages[key] = bytearray(entry.file_size)
                with archive.open(entry) as file:
                    file.readinto(storages[key])
            return _Storage(dtype, storages[key])

        with archive.open(f"{root}data.pkl") as file:
            return _Unpickler(file, storage).load()


def _read_stream(file: BinaryIO, size: int) -> Any:
    """A plain pickle of `size` bytes, or what torch.save wrote before PyTorch 1.6: pickles, then the storages."""
    first = _Unpickler(file).load()
    if first != LEGACY_MAGIC:
        return first
    _version, system = _Unpickler(file).load(), _Unpickler(file).load()
    if not system.get("little_endian", True):
        raise ValueError("written on a big-endian machine")
    storages: dict[str, tuple[bytearray, int]] = {}

    def storage(saved: tuple) -> _Storage:
        _, dtype, key, _, count, view = saved
        if count * dtype.itemsize > size:
            raise EOFError("the file is shorter than its tensors")
        if key not in storages:
            storages[key] = bytearray(count * dtype.itemsize), dtype.itemsize
        buffer, width = storages[key]
        if view is None:
            return _Storage(dtype, buffer)
        _, start, length = view
        return _Storage(dtype, memoryview(buffer)[start * width : (start + length) * width])

    content = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        buffer, width = storages[key]
        count = int.from_bytes(file.read(8), "little")
        if count * width != len(buffer) or file.readinto(buffer) != len(buffer):
            raise EOFError("the file ends within its tensors")
    return content


class _Unpickler(pickle.Unpickler):
    """Knows the names of the table only; `storage` turns torch's persistent ids into storages."""

    def __init__(self, file: BinaryIO, storage: Callable[[tuple], "_Storage"] | None = None) -> None:
        super().__init__(file, encoding="latin1")  # Python 2's texts, and the bytes of its arrays
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _table():
            raise RefusedName(full)
        return _table()[full]

    def persistent_load(self, saved: Any) -> "_Storage":
        if self.storage is None or not isinstance(saved, tuple) or saved[0] != "storage":
            raise RefusedName(f"persistent id {str(saved)[:40]}")
        return self.storage(saved)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    buffer: bytearray | memoryview


class _Function:
    """A function under a name of the table. Pickles can set attributes of what they find: not of this."""

    __slots__ = ("function",)

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedName("a change of a function")


class _Fixed(type):
    def __setattr__(cls, name: str, value: Any) -> None:
        raise RefusedName("a change of a class")


class _Namespace(argparse.Namespace, metaclass=_Fixed):
    """argparse's, closed to a file's changes of the class itself."""


class _Dtype:
    """A numpy dtype of numbers, truth values or texts. Numpy's own can be told by a file that bytes are pointers."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>=|]?[biufcSU]\d+", name):
            raise RefusedName(f"numpy.dtype {name}")
        self.name, self.order = name.lstrip("<>=|"), name[0] if name[0] in "<>" else "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.name).newbyteorder(self.order)


def _bytes(raw: bytes | str) -> bytes:
    return raw.encode("latin1") if isinstance(raw, str) else raw


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    empty = torch.empty(0, dtype=storage.dtype)
    flat = torch.frombuffer(storage.buffer, dtype=storage.dtype) if len(storage.buffer) else empty
    return flat.as_strided(size, stride, offset)  # refuses what reaches past the storage


def _tensor_v3(storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> torch.Tensor:
    _requires_grad, _hooks, dtype, *_ = rest
    return _tensor(_Storage(dtype, storage.buffer), offset, size, stride)


def _array_of_buffer(buffer: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Array:
    array = Array()
    array._fill(buffer, dtype, shape, order)
    return array


def _text_to_bytes(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedName(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


@cache
def _table() -> dict[str, Any]:
    """Every name that a file may use and what stands for it."""

    def odd(kind: str) -> _Function:
        return _Function(lambda *_: OddTensor(kind))

    first = _Function(lambda value, *_: value)
    table: dict[str, Any] = {
        "collections.OrderedDict": _Function(collections.OrderedDict),
        "collections.Counter": _Function(collections.Counter),
        "collections.defaultdict": _Function(lambda *_: {}),
        "pathlib.PosixPath": _Function(lambda *parts: str(PurePosixPath(*parts))),
        "argparse.Namespace": _Namespace,
        "_codecs.encode": _Function(_text_to_bytes),
        "torch.Size": _Function(torch.Size),
        "torch.device": _Function(torch.device),
        "torch.nn.parameter.Parameter": first,
        "torch.Tensor": first,
        "torch._utils._rebuild_tensor": _Function(_tensor),
        "torch._utils._rebuild_tensor_v2": _Function(_tensor),
        "torch._utils._rebuild_tensor_v3": _Function(_tensor_v3),
        "torch._utils._rebuild_parameter": first,
        "torch._utils._rebuild_parameter_with_state": first,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": first,
        "torch._tensor._rebuild_from_type_v2": _Function(lambda function, _, args, __: function(*args)),
        "torch.storage._load_from_bytes": _Function(lambda raw: _read_stream(io.BytesIO(raw), len(raw))),
        "torch.serialization._get_layout": _Function(str),
        "torch._utils._rebuild_sparse_tensor": odd("sparse"),
        "torch._utils._rebuild_qtensor": odd("quantised"),
        "torch._utils._rebuild_nested_tensor": odd("nested"),
        "torch._utils._rebuild_meta_tensor_no_storage": odd("meta"),
    }
    for module in ("builtins", "__builtin__"):
        table |= {
            f"{module}.{kind.__name__}": _Function(kind)
            for kind in (set, frozenset, complex, bytes, bytearray, dict, list, int, float)
        }
    for module in ("numpy.core", "numpy._core"):
        table |= {
            f"{module}.multiarray._reconstruct": _Function(lambda *_: Array()),
            f"{module}.multiarray.scalar": _Function(lambda d, raw: np.frombuffer(_bytes(raw), d.numpy())[0]),
            f"{module}.numeric._frombuffer": _Function(_array_of_buffer),
        }
    table |= {"numpy.ndarray": "an array", "numpy.dtype": _Function(_Dtype)}
    for name, dtype in STORAGES.items():
        table |= {f"{module}.{name}Storage": dtype for module in ("torch", "torch.cuda", "torch.storage")}
    table |= {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    return table | {
        str(scheme): str(scheme) for scheme in vars(torch).values() if isinstance(scheme, torch.qscheme)
    }
