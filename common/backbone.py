"""Any ResNet-family checkpoint → a Trunk with exactly its weights, or one line that says why not.

The backbone file (`save_backbone`) is a `torch.save` of plain types and tensors, read with `weights_only=True`: no
file that is given to this module can run code. Anything short of a full match of the body is refused: a wrong key
prefix that silently trains a random backbone is the complaint the field knows best.
"""

import pickle
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import digest, write_atomic
from common.trunk import ARCHS, Classifier, Trunk

FORMAT = "backbench-backbone-1"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's
BODY = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
CONTAINERS = ("state_dict", "model_state_dict", "model", "student", "net")


@dataclass
class Backbone:
    """A Trunk with its weights and what is known about them."""

    trunk: Trunk
    arch: str
    name: str  # its label in result paths
    group: str  # rows of one group are pretraining seeds of one method
    method: str
    fingerprint: str  # of the body's tensors
    source: str  # as given on the command line
    mean: tuple[float, ...] = IMAGENET_MEAN  # normalisation that the weights want, of RGB/255
    std: tuple[float, ...] = IMAGENET_STD
    input_size: int = 224
    pretrain_seed: int | None = None
    scratch: bool = False  # random weights: no task freezes anything of them
    report: list[str] = field(default_factory=list)


def load_backbone(spec: str, *, arch: str | None = None, name: str | None = None, seed: int = 0) -> Backbone:
    """Load `FILE`, `torchvision:NAME`, `timm:NAME` or `scratch[:ARCH]` (random weights drawn from `seed`).

    `arch` is only needed by `scratch`; files are recognised by their keys and shapes, and a contradiction is refused.
    Raises UserError for anything but a full, finite, trained body.
    """
    kind, _, rest = spec.partition(":")
    if kind == "scratch":
        return _scratch(rest or arch or "resnet50", spec, name, seed)
    if kind in ("torchvision", "timm") and rest:
        state, facts = _from_library(kind, rest)
    else:
        state, facts = _from_file(Path(spec).expanduser())
    state, notes = _body(state, spec)
    found = _recognise(state, spec)
    for declared in (facts.get("arch"), arch):
        if declared and declared != found:
            raise UserError(
                f"{spec}: its weights are a {found}, not a {declared}; drop --arch or give the right file"
            )
    trunk = Trunk(found)
    _load_strictly(trunk, state, spec)
    label = facts.get("method") or ("torchvision-" + rest if rest else Path(spec).name.split(".")[0])
    seed_of_file = facts.get("seed")
    return Backbone(
        trunk=trunk,
        arch=found,
        name=name or (f"{label}-p{seed_of_file}" if seed_of_file else label).replace("/", "_"),
        group=facts.get("method") or name or label,
        method=facts.get("method") or label,
        fingerprint=body_fingerprint(trunk),
        source=spec,
        mean=tuple(facts.get("mean", IMAGENET_MEAN)),
        std=tuple(facts.get("std", IMAGENET_STD)),
        input_size=int(facts.get("size", 224)),
        pretrain_seed=seed_of_file,
        report=notes,
    )


def save_backbone(path: Path | str, classifier: Classifier, **facts: Any) -> None:
    """Write a backbone file: `facts` and the state dict under torchvision's names.

    Facts are plain types: arch, num_classes, method, recipe, seed, data_fingerprint, run_id, epoch, metrics, mean,
    std, size. The file is written atomically; equal input gives equal bytes.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in classifier.torchvision_state().items()}
    write_atomic(path, lambda file: torch.save({"format": FORMAT, **facts, "state_dict": state}, file))


def read_backbone_file(path: Path | str) -> dict[str, Any]:
    """The content of a file that `save_backbone` wrote. Raises UserError for any other file or format."""
    content = read_checkpoint(Path(path))
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: not a backbone file of this project (pretrain/run.py writes them)")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path}: format {content['format']!r} is unknown here ({FORMAT} is read): update backbench"
        )
    return content


def load_classifier(path: Path | str) -> tuple[Classifier, dict[str, Any]]:
    """A whole classifier (body and `fc`) from a backbone file, and the file's facts."""
    content = read_backbone_file(path)
    classifier = Classifier(Trunk(content["arch"]), content["num_classes"])
    state = {k if k.startswith("fc.") else f"trunk.{k}": v for k, v in content["state_dict"].items()}
    classifier.load_state_dict(state)
    return classifier, {k: v for k, v in content.items() if k != "state_dict"}


def body_fingerprint(trunk: nn.Module) -> str:
    """16 hex digits over the names, shapes and values of a body's tensors."""
    state = sorted(trunk.state_dict().items())
    parts = [
        part
        for k, v in state
        if not k.endswith("num_batches_tracked")
        for part in (k, list(v.shape), _bytes(v))
    ]
    return digest(*parts)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().float().contiguous().numpy().tobytes()


@contextmanager
def _numpy_scalars():
    """Allow exactly numpy's float and int scalars, which the official CutMix checkpoints hold beside the weights."""
    scalar = np._core.multiarray.scalar
    safe = [
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Float64DType,
        np.dtypes.Float32DType,
        np.dtypes.Int64DType,
    ]
    with torch.serialization.safe_globals(safe):
        yield


def read_checkpoint(path: Path) -> Any:
    """Read a torch or safetensors file without running any code in it. Raises UserError in one line otherwise."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(
            f"{path}: {what}; --backbone takes a checkpoint file, torchvision:NAME, timm:NAME or scratch:ARCH"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with _numpy_scalars(), warnings.catch_warnings():
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
        with path.open("rb") as file:
            head = file.read(2)
        if head and head != b"PK" and head[:1] != b"\x80":  # neither a zip nor a pickle
            raise UserError(f"{path}: not a PyTorch checkpoint (a text or other file?)") from None
        first = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: truncated or damaged ({first[:120]}); fetch or write it again") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors (pip install 'backbench[interop]')") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: no readable safetensors file ({error})") from None


def _from_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, a dict of tensors was expected")
    facts: dict[str, Any] = {}
    if "format" in content and "state_dict" in content:
        facts = {k: v for k, v in read_backbone_file(path).items() if k != "state_dict"}
    for container in CONTAINERS:
        if isinstance(content.get(container), dict):
            content = content[container]
            break
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}, facts


def _from_library(kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        if kind == "torchvision":
            import torchvision

            return torchvision.models.get_model(name, weights="DEFAULT").state_dict(), {}
        import timm

        model = timm.create_model(name, pretrained=True)
        return model.state_dict(), {"mean": model.default_cfg["mean"], "std": model.default_cfg["std"]}
    except ImportError:
        raise UserError(f"{kind}:{name}: needs the package timm (pip install 'backbench[interop]')") from None
    except Exception as error:  # each library has errors of its own for an unknown name and for no network
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{kind}:{name}: cannot be had ({first[:160]}); check the name and the network"
        ) from None


def _body(state: dict[str, Tensor], spec: str) -> tuple[dict[str, Tensor], list[str]]:
    """The body's tensors under torchvision's names: the prefix is found, classifier and other heads are left out."""
    prefixes = sorted(
        {k[: -len("conv1.weight")] for k in state if k.endswith("conv1.weight") and ".layer" not in f".{k}"}
    )
    if not prefixes:
        raise UserError(
            f"{spec}: no ResNet in it: no key ends with conv1.weight (its keys begin {sorted(state)[:3]})"
        )
    momentum = ("encoder_k", "teacher", "momentum")
    prefix = next((p for p in prefixes if not any(word in p for word in momentum)), prefixes[0])
    body = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    dropped = sorted(k for k in body if not k.startswith(BODY))
    notes = [f"key prefix {prefix!r} removed"] if prefix else []
    if len(prefixes) > 1:
        notes.append(f"took {prefix!r}, not {', '.join(repr(p) for p in prefixes if p != prefix)}")
    if dropped:
        notes.append(
            f"left out {len(dropped)} keys that are no body: {', '.join(dropped[:3])}{' …' if dropped[3:] else ''}"
        )
    return {k: v for k, v in body.items() if k.startswith(BODY)}, notes


def _recognise(state: dict[str, Tensor], spec: str) -> str:
    """The architecture that block counts, block type, width and groups spell."""
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


def _load_strictly(trunk: Trunk, state: dict[str, Tensor], spec: str) -> None:
    wanted = trunk.state_dict()
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
            f"{spec}: not a whole body of a {trunk.arch}: {'; '.join(problems)}; give a complete checkpoint"
        )
    untouched = [
        k
        for k in state
        if k.endswith("running_mean") and not state[k].any() and (state[k[:-4] + "var"] == 1).all()
    ]
    if len(untouched) == sum(k.endswith("running_mean") for k in state):
        raise UserError(
            f"{spec}: its batch-norm statistics were never trained; use scratch:{trunk.arch} for random weights"
        )
    trunk.load_state_dict({**{k: wanted[k] for k in optional}, **state})


def _scratch(arch: str, spec: str, name: str | None, seed: int) -> Backbone:
    if arch not in ARCHS:
        raise UserError(f"{spec}: no architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = Trunk(arch)
    return Backbone(
        trunk=trunk,
        arch=arch,
        name=name or "scratch",
        group=name or "scratch",
        method="scratch",
        fingerprint=digest("scratch", arch),
        source=spec,
        scratch=True,
        report=["random weights: nothing is frozen and batch norm trains"],
    )
