"""Checkpoint files of the field, read without running code in them."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.common.backbones.file_kind import is_safetensors, refuse_foreign
from backbench.common.backbones.plain_pickle import Array, OddTensor, RefusedName, read_plain
from backbench.common.base.errors import UserError

ODD = {  # tensors that no network here can take, and what to do
    "meta": "it has no values: save the network after its weights are loaded",
    "quantised": "give the weights before they were quantised, or save them dequantised",
    "nested": "save plain tensors",
    "sparse": "save it as a dense tensor (tensor.to_dense())",
    "complex": "networks here have real weights",
}


def read_checkpoint(path: Path) -> Any:
    """Read a file of torch.save (of any age, pickle protocol and Python), of pickle.dump, or safetensors.

    No code in it runs. Raises UserError, in one line, for any other file, a damaged one, and one with Python objects.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(
            f"{path}: {what}; --backbone takes a checkpoint file, torchvision:NAME, timm:NAME or scratch:ARCH"
        )
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        refuse_foreign(path)
        content = _read_safetensors(path) if is_safetensors(head) else _read_torch(path)
        _refuse_odd(content, str(path))
        return content
    except UserError:
        raise
    except RefusedName as error:
        raise UserError(
            f"{path}: holds Python objects that could run code ({error}); save a plain state dict instead"
        ) from None
    except MemoryError:
        raise UserError(
            f"{path}: takes more memory than there is; give a file with the weights alone"
        ) from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # readers of damaged files raise anything
        if head[:2] != b"PK" and head[:1] != b"\x80" and not is_safetensors(head):  # no zip and no pickle
            raise UserError(f"{path}: not a PyTorch checkpoint (a text or other file?)") from None
        first = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or damaged ({first[:120]}); fetch or write it again") from None


def _read_torch(path: Path) -> Any:
    """PyTorch's own reader first; what it does not know is left to the reader of plain pickles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception:
            return read_plain(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors (pip install 'backbench[interop]')") from None
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("backbench", "{}"))
        return {**facts, "state_dict": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118


def _refuse_odd(content: Any, spec: str, prefix: str = "") -> None:
    """Raise UserError, with its key, for a tensor that is none of plain numbers."""
    for key, value in content.items() if isinstance(content, dict) else ():
        kind = (
            value.kind
            if isinstance(value, OddTensor)
            else _kind(value)
            if isinstance(value, Tensor)
            else None
        )
        if kind:
            raise UserError(f"{spec}: {prefix}{key} is a {kind} tensor; {ODD[kind]}")
        _refuse_odd(value, spec, f"{prefix}{key}.")


def _kind(tensor: Tensor) -> str | None:
    odd = {
        "meta": tensor.is_meta,
        "quantised": tensor.is_quantized,
        "nested": tensor.is_nested,
        "sparse": tensor.layout != torch.strided,
        "complex": tensor.is_complex(),
    }
    return next((kind for kind, is_it in odd.items() if is_it), None)


def tensors_of(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts under dotted names; of lists those that are averages of weights, by number."""
    found = {}
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        value = value.tensor if isinstance(value, Array) else value
        if isinstance(value, Tensor):
            found[prefix + key] = value
        elif isinstance(value, dict):
            found |= tensors_of(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and re.search("ema|shadow|averag", f"{prefix}{key}"):
            found |= {f"{prefix}{key}.{i}": v for i, v in enumerate(value) if isinstance(v, Tensor)}
    return found
