"""Checkpoint files of the field: read without running code, and the ResNet found in them under torchvision's names."""

import argparse
import json
import pickle
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.trunk import ARCHS

BODY = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
# children of a ResNet in an nn.Sequential, as lightly and others cut it
NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# of two networks in a file the one that its authors evaluate: MoCo's query, BYOL's online, DINO's teacher
SECOND = ("encoder_k", "momentum", "target", "ema", "student")
HEADS = ("fc", "head.fc", "head", "classifier", "linear")  # where a linear classifier stands


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
    """The tensors of nested dicts under dotted names."""
    found = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            found[prefix + key] = value
        elif isinstance(value, dict) and isinstance(key, str):
            found |= tensors_of(value, f"{prefix}{key}.")
    return found


def find_resnet(tensors: dict[str, Tensor], spec: str) -> tuple[dict, dict, list[str]]:
    """(body, head, notes): a ResNet's tensors under torchvision's names, `fc.weight` and `fc.bias` if there are.

    The prefix is whatever stands before the stem (`module.`, `state_dict.module.encoder_q.`, `backbone.` …), with
    names or with the numbers of an nn.Sequential behind it; of several networks the evaluated one is taken. Raises
    UserError when there is none.
    """
    stems = {
        k: k[: -len("conv1.weight")]
        for k in tensors
        if k.endswith("conv1.weight") and ".layer" not in f".{k}"
    }
    numbered = {
        k: k[: -len("0.weight")]
        for k, v in tensors.items()
        if k.endswith("0.weight") and v.ndim == 4 and f"{k[: -len('0.weight')]}4.0.conv1.weight" in tensors
    }
    prefixes = sorted({**stems, **numbered}.values(), key=lambda p: (any(word in p for word in SECOND), p))
    if not prefixes:
        raise UserError(_no_resnet(tensors, spec))
    prefix = prefixes[0]
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if prefix in numbered.values():
        own = {
            NUMBERED.get(k.split(".")[0], k.split(".")[0]) + k[len(k.split(".")[0]) :]: v
            for k, v in own.items()
        }
    body = {k: v for k, v in own.items() if k.startswith(BODY)}
    head = _head(own, tensors, prefix)
    others = [p for p in prefixes if p != prefix]
    left = [k for k in own if not k.startswith(BODY)]
    left += [k for k in tensors if not k.startswith((prefix, *others))]
    notes = [f"{len(body)} keys of a body found"]
    if prefix:
        notes.append(f"key prefix {prefix!r} removed")
    if others:
        notes.append(f"took {prefix!r}, not {', '.join(map(repr, others))}")
    if left:
        some = f"{', '.join(sorted(left)[:3])}{' …' if left[3:] else ''}"
        notes.append(f"left out {len(left)} keys that are no body: {some}")
    return body, head, notes


def _no_resnet(tensors: dict[str, Tensor], spec: str) -> str:
    if any(k.endswith("conv1.0.weight") and ".layer" not in f".{k}" for k in tensors):
        return (
            f"{spec}: its stem is several convolutions (conv1.0.weight …: a resnet50d, -c or -s); "
            "the networks here begin with one 7×7 (torchvision's and timm's resnet18 to resnet152)"
        )
    return f"{spec}: no ResNet in it: no key ends with conv1.weight (its keys begin {sorted(tensors)[:3]})"


def _head(own: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The linear classifier beside or above the body."""
    places = [(own, f"{name}.") for name in HEADS]
    parts = prefix.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        outer = "".join(part + "." for part in parts[:depth])
        places += [(tensors, f"{outer}{name}.") for name in HEADS]
    for scope, name in places:
        weight = scope.get(name + "weight")
        if weight is not None and weight.ndim == 2:
            bias = scope.get(name + "bias")
            return {"fc.weight": weight, "fc.bias": torch.zeros(len(weight)) if bias is None else bias}
    return {}


def recognise(state: dict[str, Tensor], spec: str) -> str:
    """The architecture that block counts, block type, width and groups spell. UserError when none does."""
    if state["conv1.weight"].shape[-1] == 3:
        raise UserError(cifar_line(spec, "its first convolution is 3×3"))
    blocks = tuple(len({k.split(".")[1] for k in state if k.startswith(f"layer{n}.")}) for n in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in state
    width, conv2 = state["conv1.weight"].shape[0], state.get("layer1.0.conv2.weight")
    groups = conv2.shape[0] // conv2.shape[1] if conv2 is not None else 1
    for arch, (block, counts, planes, arch_groups, _) in ARCHS.items():
        if (
            (counts, planes) == (blocks, width)
            and (block.expansion == 4) == bottleneck
            and groups == arch_groups
        ):
            return arch
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(
        f"{spec}: its body (blocks {blocks}, {kind}, width {width}, groups {groups}) is none of {', '.join(ARCHS)}; "
        "an incomplete file, or a network this project does not know"
    )


def cifar_line(spec: str, why: str) -> str:
    """What is said of a network for 32-pixel images."""
    return (
        f"{spec}: a CIFAR network ({why}): no transfer task takes it; evaluate it with pretrain/evaluate.py"
    )


def check_body(wanted: dict[str, Tensor], state: dict[str, Tensor], arch: str, spec: str) -> None:
    """Raise UserError unless `state` is a full, finite, trained match of `wanted` (`num_batches_tracked` aside)."""
    optional = {k for k in wanted if k.endswith("num_batches_tracked")}
    problems = []
    for what, keys in (
        ("missing", [k for k in wanted if k not in state and k not in optional]),
        ("unexpected", [k for k in state if k not in wanted]),
        ("misshapen", [k for k in state if k in wanted and state[k].shape != wanted[k].shape]),
        ("not finite", [k for k in state if not torch.isfinite(state[k].float()).all()]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{' …' if keys[3:] else ''})")
    if problems:
        raise UserError(
            f"{spec}: not a whole body of a {arch}: {'; '.join(problems)}; give a complete checkpoint"
        )
    means = [k for k in state if k.endswith("running_mean")]
    if all(not state[k].any() and (state[k[:-4] + "var"] == 1).all() for k in means):
        raise UserError(
            f"{spec}: its batch-norm statistics were never trained; use scratch:{arch} for random weights"
        )
