"""Checkpoint files of the field, read without running code in them."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError


def read_checkpoint(path: Path) -> Any:
    """Read a torch or safetensors file without running any code in it. Raises UserError in one line otherwise."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(
            f"{path}: {what}; --backbone takes a checkpoint file, torchvision:NAME, timm:NAME or scratch:ARCH"
        )
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head[:1] == b"<":
        raise UserError(f"{path}: a web page, not a checkpoint (a download that failed?); fetch it again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with _plain_objects(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocols of files that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or "GLOBAL" in str(error):
            culprit = (
                str(error).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in str(error) else "Python objects"
            )
            raise UserError(
                f"{path}: holds pickled objects that could run code ({culprit}); save a plain state dict instead"
            ) from None
        raise UserError(f"{path}: not a PyTorch checkpoint (a text or other file?)") from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, AttributeError) as error:
        if head and head[:2] != b"PK" and head[:1] != b"\x80":  # neither a zip nor a pickle
            raise UserError(f"{path}: not a PyTorch checkpoint (a text or other file?)") from None
        first = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or damaged ({first[:120]}); fetch or write it again") from None


@contextmanager
def _plain_objects():
    """Allow exactly numpy's float and int scalars (official CutMix) and argparse's Namespace (DINO) beside weights."""
    scalar = np._core.multiarray.scalar
    safe = [
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
        argparse.Namespace,
    ]
    with torch.serialization.safe_globals(safe):
        yield


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors (pip install 'backbench[interop]')") from None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("backbench", "{}"))
            return {**facts, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: no readable safetensors file ({error}); fetch or write it again") from None


def tensors_of(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts under dotted names; of lists those that are averages of weights, by number."""
    found = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            found[prefix + key] = value
        elif isinstance(value, dict) and isinstance(key, str):
            found |= tensors_of(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and re.search("ema|shadow|averag", f"{prefix}{key}"):
            found |= {f"{prefix}{key}.{i}": v for i, v in enumerate(value) if isinstance(v, Tensor)}
    return found
