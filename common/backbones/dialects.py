"""Other libraries' names of a ResNet's tensors → torchvision's, and how their weights read an image where it is known.

One table. A name that no row knows stays as it is; what is no such ResNet, and known for what it is, is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from backbench.common.base.errors import UserError

CAFFE = {  # Caffe's ResNets and their heirs: BGR, 0 to 255 less the mean, stride in the 1×1 convolution
    "mean": (122.7717 / 255, 115.9465 / 255, 102.9801 / 255),
    "std": (1 / 255,) * 3,
    "bgr": True,
    "stride_in_1x1": True,
}
DETECTRON2 = {**CAFFE, "mean": (123.675 / 255, 116.28 / 255, 103.53 / 255)}  # detectron2/config/defaults.py
# `__author__` in files of converters to detectron2's names: facebookresearch/moco, detection/convert-pretrain.py …
CONVERTED = ("torchvision", "MOCO", "OpenSelfSup")


@dataclass(frozen=True)
class Dialect:
    """A library's names: of the stem's convolution and norm, by which it is known, and the rules to torchvision's."""

    name: str
    stem: str
    norm: str
    rules: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
    facts: dict[str, Any] = field(default_factory=dict)


def _stage(first: int, rest: str) -> Callable[[re.Match], str]:
    """`layerN.` and the rest of a name, whose stages are numbered from `first`, its layers ("K") from 0."""

    def name(match: re.Match) -> str:
        groups = match.groupdict()
        text = rest.replace("K", str(int(groups.get("k") or 0) + 1))
        return f"layer{int(groups['n']) - first + 1}.{groups['m']}.{text}"

    return name


def _caffe(match: re.Match) -> str:
    """`res4b17_branch2a`, `bn4b17_branch2a`, `scale4b17_branch2a`."""
    what, stage, block, branch = match.groups()
    number = int(block[1:]) if block[1:] else ord(block) - ord("a")
    kind = "conv" if what == "res" else "bn"
    if branch == "1":
        return f"layer{int(stage) - 1}.{number}.downsample.{int(kind == 'bn')}."
    return f"layer{int(stage) - 1}.{number}.{kind}{'abc'.index(branch[1]) + 1}."


DIALECTS = (
    Dialect(
        "detectron2",
        r"stem\.conv1\.weight",
        r"stem\.conv1\.norm\.weight",
        (
            (r"stem\.conv1\.norm\.", "bn1."),
            (r"stem\.(conv1|fc)\.", r"\1."),
            (r"res(?P<n>[2-5])\.(?P<m>\d+)\.shortcut\.norm\.", _stage(2, "downsample.1.")),
            (r"res(?P<n>[2-5])\.(?P<m>\d+)\.shortcut\.", _stage(2, "downsample.0.")),
            *((rf"res(?P<n>[2-5])\.(?P<m>\d+)\.conv{k}\.norm\.", _stage(2, f"bn{k}.")) for k in (1, 2, 3)),
            *((rf"res(?P<n>[2-5])\.(?P<m>\d+)\.conv{k}\.", _stage(2, f"conv{k}.")) for k in (1, 2, 3)),
        ),
        DETECTRON2,
    ),
    Dialect(
        "maskrcnn-benchmark",
        r"stem\.conv1\.weight",
        r"stem\.bn1\.weight",
        ((r"stem\.(conv1|bn1)\.", r"\1."),),
        CAFFE,
    ),
    Dialect(
        "Caffe",
        r"conv1\.weight",
        r"bn_conv1\.running_mean",
        (
            (r"(?:bn|scale)_conv1\.", "bn1."),
            (r"(res|bn|scale)([2-5])([a-z]\d*)_branch(1|2[abc])\.", _caffe),
            (r"fc1000\.", "fc."),
        ),
        CAFFE,
    ),
    Dialect(
        "HuggingFace",  # transformers' ResNetModel and ResNetForImageClassification
        r"embedder\.embedder\.convolution\.weight",
        r"embedder\.embedder\.normalization\.weight",
        (
            (r"embedder\.embedder\.convolution\.", "conv1."),
            (r"embedder\.embedder\.normalization\.", "bn1."),
            *(
                (rf"encoder\.stages\.(?P<n>\d+)\.layers\.(?P<m>\d+)\.{theirs}\.", _stage(0, ours))
                for theirs, ours in (
                    (r"shortcut\.convolution", "downsample.0."),
                    (r"shortcut\.normalization", "downsample.1."),
                    (r"layer\.(?P<k>\d+)\.convolution", "convK."),
                    (r"layer\.(?P<k>\d+)\.normalization", "bnK."),
                )
            ),
            (r"classifier\.1\.", "fc."),
        ),
    ),
    Dialect(
        "a stem called layer0",  # pretrainedmodels' SENets, pytorch-semseg …
        r"layer0\.(?:conv1|0)\.weight",
        r"layer0\.(?:bn1|1)\.weight",
        ((r"layer0\.(conv1|bn1)\.", r"\1."), (r"layer0\.0\.", "conv1."), (r"layer0\.1\.", "bn1.")),
    ),
)
BODY = r"(?:conv1|layer[1-4]\.\d+\.(?:conv[123]|downsample\.0))"
KNOWN = (  # keys of what no network here is, what it is and what to do
    (
        r"attnpool\.positional_embedding",
        "CLIP's ResNet (three convolutions in its stem, attention as its pooling)",
        "",
    ),
    (
        r"res\d_\d+_branch2[abc]_(?:w|bn_s)",
        "Detectron's weights for Caffe2, their batch norms folded into scales without statistics",
        "weights of a ResNet with its statistics",
    ),
    (r"_variance", "PaddlePaddle's weights", "a PyTorch state dict of them"),
    (
        rf"{BODY}\.weight_(?:orig|mask)",
        "pruned with torch.nn.utils.prune, masks beside the weights",
        "weights saved after prune.remove",
    ),
    (
        rf"{BODY}\.(?:weight_[gv]|parametrizations\..*)",
        "reparametrised (weight norm or kin)",
        "weights saved after the parametrisation is removed",
    ),
)


def to_torchvision(
    tensors: dict[str, Tensor], content: Mapping[str, Any], spec: str
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """(tensors under torchvision's names, facts on how they read an image, notes).

    The facts are `load_backbone`'s: mean and std of RGB/255, bgr, stride_in_1x1. Prefixes stay. Raises UserError for
    what is known to be no ResNet of batch norms with statistics.
    """
    for pattern, what, advice in KNOWN:
        key = next((k for k in tensors if re.search(rf"(?:^|\.){pattern}$", k)), None)
        if key:
            raise UserError(f"{spec}: {what} ({key}); give {advice or 'a ResNet as torchvision has it'}")
    notes, facts = [], {}
    dialect = next((d for d in DIALECTS if _speaks(tensors, d)), None)
    if dialect:
        renamed = {_renamed(key, dialect): value for key, value in tensors.items()}
        if len(renamed) < len(tensors):
            raise UserError(
                f"{spec}: two of its tensors have the same name in torchvision's ResNet; save it anew"
            )
        notes.append(f"names of {dialect.name} turned into torchvision's")
        tensors, facts, said = _reading(renamed, dialect, content)
        notes += said
    _refuse_folded(tensors, spec)
    return tensors, facts, notes


def _speaks(tensors: Mapping[str, Tensor], dialect: Dialect) -> bool:
    """Whether a file has this library's 7×7 convolution and the norm behind it."""
    stem = any(v.shape[2:] == (7, 7) for k, v in tensors.items() if re.search(rf"(?:^|\.){dialect.stem}$", k))
    return stem and any(re.search(rf"(?:^|\.){dialect.norm}$", k) for k in tensors)


def _renamed(key: str, dialect: Dialect) -> str:
    for pattern, name in dialect.rules:
        new, found = re.subn(rf"(?<![^.]){pattern}", name, key, count=1)
        if found:
            return new
    return key


def _reading(
    tensors: dict[str, Tensor], dialect: Dialect, content: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """(tensors without detectron2's pixel_mean and pixel_std, facts, what is said of them)."""
    if not dialect.facts:
        return tensors, {}, []
    pixel = {
        name: value.flatten().tolist()
        for key, value in tensors.items()
        if (name := key.rpartition(".")[2]) in ("pixel_mean", "pixel_std") and value.numel() == 3
    }
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] not in pixel}
    if content.get("__author__") in CONVERTED:
        said = f"converted from {content['__author__']}'s weights, it says: RGB with ImageNet's mean and std"
        return tensors, {}, [said]
    if len(pixel) == 2:
        facts, source = (
            _pixel_facts(pixel["pixel_mean"], pixel["pixel_std"]),
            "its pixel_mean and pixel_std say",
        )
    else:
        facts, source = dict(dialect.facts), "that library's own settings are"
    if not any(key.endswith("layer1.0.conv3.weight") for key in tensors):
        facts["stride_in_1x1"] = False  # two 3×3 convolutions a block
    mean, std = (", ".join(f"{v * 255:.4g}" for v in facts[what]) for what in ("mean", "std"))
    text = f"{'BGR' if facts['bgr'] else 'RGB'}, less {mean} (R, G, B), over {std}"
    text += ", stride in the 1×1" if facts["stride_in_1x1"] else ""
    flags = "--input-mean, --input-std, --no-bgr or --no-stride-in-1x1"
    return tensors, facts, [f"read as {source}, unless {flags} say otherwise: {text}"]


def _pixel_facts(mean: list[float], std: list[float]) -> dict[str, Any]:
    """detectron2's PIXEL_MEAN and PIXEL_STD, of 255; only its weights with a std of 1 stride in the 1×1."""
    bgr = mean[0] < mean[2]  # in ImageNet blue is the darkest
    if bgr:
        mean, std = mean[::-1], std[::-1]
    shares = {"mean": tuple(v / 255 for v in mean), "std": tuple(v / 255 for v in std)}
    return {**shares, "bgr": bgr, "stride_in_1x1": std == [1.0, 1.0, 1.0]}


def _refuse_folded(tensors: Mapping[str, Tensor], spec: str) -> None:
    """Raise UserError for biases in place of batch norms, and for weights that are whole numbers."""
    for key, value in tensors.items():
        block = re.search(r"(?:^|\.)layer[1-4]\.\d+\.conv1\.(bias|weight)$", key)
        if block and block[1] == "weight" and not value.dtype.is_floating_point:
            raise UserError(
                f"{spec}: {key} holds whole numbers ({str(value.dtype).removeprefix('torch.')}): weights quantised by "
                "another library; give them before they were quantised"
            )
        if block and block[1] == "bias" and key.replace("conv1.bias", "bn1.running_mean") not in tensors:
            raise UserError(
                f"{spec}: {key}: its batch norms are folded into its convolutions (made for inference); give the "
                "weights as they were trained"
            )
