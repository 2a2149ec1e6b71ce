"""The ResNet among a file's tensors, under torchvision's names; what else the file holds must be known not to matter.

A tensor that is neither of the body nor of a known head may stand between the stages (a gate, a norm before the stem):
the plain network would load without it and compute something else.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backbench.common.backbones.network_choice import ROLES, choose, display, root, shown
from backbench.common.backbones.resnet import ARCHS
from backbench.common.base.errors import UserError

BODY = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
# children of a ResNet in an nn.Sequential, as lightly and others cut it
NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
CLASSIFIERS = (
    "fc",
    "head.fc",
    "head",
    "classifier",
    "linear",
    "last_linear",
)  # where a linear classifier stands
# torch.compile, activation checkpointing, FSDP and fairscale put these into the names of what they wrap
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module")
NORMALISERS = {
    "mean": "mean",
    "new_mean": "mean",
    "std": "std",
    "new_std": "std",
}  # MadryLab/robustness: new_mean

# modules that follow the body or stand beside it, by whose code names them so
HEADS = {
    *(
        "fc",
        "head",
        "heads",
        "classifier",
        "classifiers",
        "linear",
        "last_linear",
        "logits",
        "clf",
        "cls_head",
    ),
    *(
        "linear_classifier",
        "linear_head",
        "classification_head",
        "auxiliary_head",
        "aux_classifier",
        "evaluator",
    ),
    # MoCo, SimCLR, BYOL, SimSiam, Barlow Twins, VICReg(L), SupContrast, NNCLR; solo-learn, lightly, pl_bolts
    *("projector", "projection", "projections", "projection_head", "projection_mlp", "proj_head", "mlp"),
    "projetion",  # sthalles/PyTorch-BYOL
    *("predictor", "prediction", "prediction_head", "prediction_mlp", "contrastive_head", "maps_projector"),
    *(
        "queue",
        "queue_ptr",
        "queue_labels",
        "queue_y",
        "memory_bank",
        "nn_queue",
        "temperature",
        "logit_scale",
    ),
    *("prototypes", "top_layer", "last_layer", "center"),  # SwAV, DeepCluster, SeLa; DINO
    *("neck", "rot_head", "jigsaw_head", "densecl_neck", "neck_pos"),  # mmpretrain, mmselfsup, DenseCL, PIRL
    # detectors and segmenters: torchvision, detectron2, mmdetection, mmsegmentation, DETR, segmentation_models_pytorch
    *(
        "fpn",
        "rpn",
        "roi_heads",
        "rpn_head",
        "roi_head",
        "bbox_head",
        "mask_head",
        "proposal_generator",
        "anchor_generator",
    ),
    *(
        "decode_head",
        "decoder",
        "segmentation_head",
        "sem_seg_head",
        "keypoint_head",
        "extra_layers",
        "extras",
    ),
    *(
        "transformer",
        "class_embed",
        "bbox_embed",
        "query_embed",
        "query_embedding",
        "level_embed",
        "input_proj",
    ),
    *(
        "fpn_lateral",
        "fpn_output",
        "top_block",
    ),
}
DILATED = {"decode_head", "aux_classifier", "auxiliary_head"}  # segmenters dilate layer3 and layer4
STATE = (  # what a training keeps beside its network
    r"optim\w*|\w*schedulers?|(grad_|loss_|amp_)?scaler|amp|\w*rng\w*|criterion|\w*loss(es|_fn)?|metrics?|callbacks|loops|"
    r"(class|label|loss|pos)_weights?|n_averaged|num_updates|steps?|iteration|(train|valid?|test|best)_?(acc|loss|metric|top|f1|auroc|prec)\w*"
)
STATE_DICTS = r"\w*state(_dict)?|model|net|network|weights|params"  # what a state dict is called in a file
OTHERS = (  # a key that only this family has
    (r"(^|\.)conv_stem\.|(^|\.)_conv_stem\.", "an EfficientNet or a MobileNet (conv_stem)"),
    (
        r"(^|\.)(patch_embed|cls_token|class_token|patch_embeddings)\b",
        "a vision transformer (patch_embed, cls_token)",
    ),
    (r"(^|\.)features\.denseblock1\.", "a DenseNet"),
    (r"(^|\.)trunk_output\.block1\.", "a RegNet"),
    (r"(^|\.)(downsample_layers\.0\.0|stages\.0\.blocks\.0\.conv_dw)\.", "a ConvNeXt"),
    (
        r"(^|\.)features\.0\.0\.weight",
        "a MobileNet, an EfficientNet or a ConvNeXt of torchvision (features.0.0)",
    ),
    (r"(^|\.)features\.0\.weight", "a VGG or an AlexNet (features.0)"),
    (r"(^|\.)Mixed_5b\.", "an Inception"),
    (r"(^|\.)attnpool\.", "a CLIP image encoder (attnpool)"),
)
FAMILY = {  # what this project does not build: blocks a stage, groups, width of a group
    "resnext50_32x4d": ((3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": ((3, 4, 23, 3), 32, 8),
    "resnext101_32x16d": ((3, 4, 23, 3), 32, 16),
    "resnext101_32x32d": ((3, 4, 23, 3), 32, 32),
    "resnext101_32x48d": ((3, 4, 23, 3), 32, 48),
    "resnext101_64x4d": ((3, 4, 23, 3), 64, 4),
    "resnext50d_32x4d": ((3, 4, 6, 3), 32, 4),
    "wide_resnet50_2": ((3, 4, 6, 3), 1, 128),
    "wide_resnet101_2": ((3, 4, 23, 3), 1, 128),
    "resnet26": ((2, 2, 2, 2), 1, 64),
}


@dataclass
class Found:
    """A ResNet's tensors under torchvision's names, its linear classifier (`fc.weight`, `fc.bias`) if there is one."""

    body: dict[str, Tensor]
    head: dict[str, Tensor]
    notes: list[str]
    choice: str = ""  # what `weights` asked for, for the label
    normaliser: dict[str, list[float]] = field(
        default_factory=dict
    )  # mean and std that the network itself takes off


def find_resnet(
    tensors: dict[str, Tensor], spec: str, weights: str | None = None, leave_out: tuple[str, ...] = ()
) -> Found:
    """Find the ResNet of a file and account for everything else in it.

    The prefix is whatever stands before the stem (`module.`, `state_dict.module.encoder_q.`, `backbone.` …), with names
    or with the numbers of an nn.Sequential behind it; of several networks see `choose`. Tensors that are no known head
    are refused unless they belong to a module named in `leave_out`, or lie outside a network that `weights` names.
    Raises UserError.
    """
    tensors, wrappers = _unwrapped(tensors, spec)
    networks = {prefix: _own(tensors, prefix, numbered) for prefix, numbered in _prefixes(tensors).items()}
    if not networks:
        raise UserError(f"{spec}: {_no_resnet(tensors)}")
    places = {p: {k: full for k, full in own.items() if k.startswith(BODY)} for p, own in networks.items()}
    bodies = {p: {k: tensors[full] for k, full in own.items()} for p, own in places.items()}
    prefix, others, choice = choose(bodies, tensors, spec, weights)
    bodily = {full for own in places.values() for full in own.values()}
    roots = tuple(filter(None, (root(p, prefix) for p in others)))
    left = [k for k in tensors if k not in bodily and not (roots and k.startswith(roots))]
    twins = [p for p in networks if p not in others]  # the one taken among them
    scope, follow = _scope(prefix, weights), tuple(f"{module}." for module in leave_out)
    strangers = [k for k in left if k.startswith(scope) and not any(_known(k, p, tensors) for p in twins)]
    strangers = [k for k in strangers if not f"{display(k)}.".startswith(follow)]
    if weights:
        strangers = [k for k in strangers if not re.search(ROLES["ema"], k.lower().replace(".", "_"))]
    if strangers:
        raise UserError(f"{spec}: {_accuse(strangers, prefix)}")
    notes = [f"{len(bodies[prefix])} keys of a body found"]
    if wrappers:
        notes.append(f"wrappers left out of the names: {', '.join(wrappers)}")
    if display(prefix):
        notes.append(f"key prefix {display(prefix)!r} removed")
    notes += choice
    if left:
        names = sorted(display(k.removeprefix(prefix)) for k in left)
        some = f"{', '.join(names[:3])}{' …' if names[3:] else ''}"
        notes.append(f"left out {len(left)} keys that are no body: {some}")
    if any(_beyond(k, prefix)[0][0] in DILATED for k in left):
        notes.append("a segmenter's body: its layer3 and layer4 may have been dilated; here they stride")
    own = {k: tensors[full] for k, full in networks[prefix].items()}
    normaliser = _normaliser({k: tensors[k] for k in left})
    return Found(
        bodies[prefix], _head(own, tensors, prefix), notes, shown(weights) if weights else "", normaliser
    )


def _unwrapped(tensors: dict[str, Tensor], spec: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the wrappers in their names, and the wrappers met."""
    made: dict[str, Tensor] = {}
    met = set()
    for key, value in tensors.items():
        parts = key.split(".")
        met |= set(parts) & set(WRAPPERS)
        plain = ".".join(p for p in parts if p not in WRAPPERS)
        plain = re.sub(
            r"((?:^|\.)(?:conv1|bn1|layer[1-4])\.(?:\d+\.)?)module\.", r"\1", plain
        )  # DDP of a part
        if plain in made and not (made[plain].shape == value.shape and torch.equal(made[plain], value)):
            raise UserError(
                f"{spec}: {key} and {plain} are the same parameter with different values; save one of the two"
            )
        made[plain] = value
    return made, sorted(met)


def _prefixes(tensors: dict[str, Tensor]) -> dict[str, bool]:
    """The prefix of each ResNet in the file → whether its children are numbered."""
    found = {}
    for key, value in tensors.items():
        prefix = key.removesuffix("conv1.weight")
        if prefix != key and f"{prefix}layer1.0.conv1.weight" in tensors:
            found[prefix] = False
        prefix = key.removesuffix("0.weight")
        if prefix != key and value.ndim == 4 and f"{prefix}4.0.conv1.weight" in tensors:
            found[prefix] = True
    return dict(sorted(found.items(), key=lambda item: (_rank(item[0]), item[0])))


def _rank(prefix: str) -> bool:
    """Whether this network usually is the second one."""
    return any(re.search(ROLES[role], prefix) for role in ("key", "momentum", "target", "ema", "student"))


def _own(tensors: dict[str, Tensor], prefix: str, numbered: bool) -> dict[str, str]:
    """Torchvision's name of each tensor under a prefix → its key."""
    own = {k.removeprefix(prefix): k for k in tensors if k.startswith(prefix)}
    if not numbered:
        return own
    return {
        ".".join([NUMBERED.get(k.split(".")[0], k.split(".")[0]), *k.split(".")[1:]]): v
        for k, v in own.items()
    }


def _scope(prefix: str, weights: str | None) -> str:
    """The part of the file that must be accounted for: all of it, or what `weights` names."""
    if weights is None or not prefix:
        return ""
    if weights.strip(".") in (prefix.strip("."), shown(prefix)):
        return prefix
    pattern = ROLES.get(weights)
    parts = prefix.split(".")
    for depth, part in enumerate(parts):
        if pattern and re.search(pattern, part):
            return "".join(p + "." for p in parts[: depth + 1])
    return ""


def _beyond(key: str, prefix: str) -> tuple[list[str], list[str]]:
    """The parts of a key behind what it shares with a prefix, and the rest of the prefix."""
    parts, rest = key.split("."), prefix.split(".")[:-1]
    while rest and len(parts) > 1 and parts[0] == rest[0]:
        parts, rest = parts[1:], rest[1:]
    return parts, rest


def _known(key: str, prefix: str, tensors: dict[str, Tensor]) -> bool:
    """Whether a tensor left out is a head's, a normaliser's (see `_normaliser`) or a training's state."""
    tensor = tensors[key]
    parts, rest = _beyond(key, prefix)
    if {parts[0].lower(), _without_role(parts[0])} & HEADS or re.fullmatch(STATE, parts[0].lower()):
        return True
    if parts[-1] in NORMALISERS and tensor.numel() == 3:
        return True
    if rest:  # outside the network
        number = len(parts) == 1 and tensor.numel() <= 1 and re.fullmatch(STATE_DICTS, rest[0])
        later = parts[0].isdecimal() and rest[0].isdecimal() and int(parts[0]) > int(rest[0])
        return bool(number) or later or _behind_projector(key, parts, tensors)  # later: of an nn.Sequential
    return parts[0].isdecimal() and int(parts[0]) > 7  # a numbered ResNet's pooling, flattening, classifier


def _behind_projector(key: str, parts: list[str], tensors: dict[str, Tensor]) -> bool:
    """Whether a tensor is of Barlow Twins' `bn`: as wide as what its projector gives."""
    outer = key.removesuffix(".".join(parts))
    widths = {v.shape[0] for k, v in tensors.items() if k.startswith(f"{outer}projector.") and v.ndim == 2}
    return parts[0] == "bn" and (tensors[key].numel() in widths or (bool(widths) and tensors[key].ndim == 0))


def _without_role(name: str) -> str:
    """`momentum_projector`, `projection_head_momentum`, `online_predictor` without what says whose it is."""
    roles = r"momentum|online|target|teacher|student|base|ema|k|q|key|query"
    return re.sub(rf"^({roles})_|_({roles})$|\d+$", "", name.lower())


def _normaliser(left: dict[str, Tensor]) -> dict[str, list[float]]:
    return {
        NORMALISERS[name]: value.double().flatten().tolist()
        for key, value in left.items()
        if (name := key.rpartition(".")[2]) in NORMALISERS and value.numel() == 3
    }


def _accuse(strangers: list[str], prefix: str) -> str:
    """What is said of tensors that may matter, of one line."""
    for key in strangers:
        parts, rest = _beyond(key, prefix)
        role = next((r for r, pattern in ROLES.items() if re.search(pattern, parts[0].lower())), None)
        own = next((r for r, pattern in ROLES.items() if rest and re.search(pattern, rest[0].lower())), None)
        if role and rest:
            return (
                f"holds a second network that is no ResNet ({display(key)} …) beside {display(prefix)!r}; "
                f"say --weights {own or shown(prefix)} to take the latter"
            )
    names = sorted(display(k.removeprefix(prefix)) for k in strangers)
    modules = sorted({display(key).rpartition(".")[0] or display(key) for key in strangers})
    return (
        f"{len(names)} tensors belong neither to a plain ResNet nor to a known head ({', '.join(names[:3])}"
        f"{' …' if names[3:] else ''}) and may stand between its stages; if they follow the body, say --leave-out "
        f"{','.join(modules[:3])}{' …' if modules[3:] else ''}"
    )


def _no_resnet(tensors: dict[str, Tensor]) -> str:
    keys = list(tensors)
    for pattern, what in OTHERS:
        if any(re.search(pattern, k) for k in keys):
            return f"{what}, not a ResNet; the networks here are {', '.join(ARCHS)}"
    stems = [k for k in keys if re.search(r"(^|\.)conv1\.0\.weight$", k) and ".layer" not in f".{k}"]
    if any(f"{k.removesuffix('conv1.0.weight')}layer1.0.conv1.weight" in tensors for k in stems):
        return (
            "its stem is several convolutions (conv1.0.weight …: a resnet50d, -c or -s); "
            "the networks here begin with one 7×7 (torchvision's and timm's resnet18 to resnet152)"
        )
    if any(re.search(r"(^|\.)layer1\.0\.conv1\.weight$", k) for k in keys):
        return "stages of a ResNet, but no stem before them (no conv1.weight); give a complete checkpoint"
    return f"no ResNet in it: no conv1.weight with a layer1 behind it (its keys begin {sorted(keys)[:3]})"


def _head(own: dict[str, Tensor], tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The linear classifier beside or above the body."""
    places = [(own, f"{name}.") for name in CLASSIFIERS]
    parts = prefix.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        outer = "".join(part + "." for part in parts[:depth])
        places += [(tensors, f"{outer}{name}.") for name in CLASSIFIERS]
    for scope, name in places:
        weight = scope.get(name + "weight")
        if weight is not None and weight.ndim == 2:
            bias = scope.get(name + "bias")
            return {"fc.weight": weight, "fc.bias": torch.zeros(len(weight)) if bias is None else bias}
    return {}


def recognise(state: dict[str, Tensor], spec: str) -> str:
    """The architecture that stem, block counts, block type, width and groups spell. UserError when none does."""
    planes, channels, *kernel = state["conv1.weight"].shape
    if kernel == [3, 3]:
        raise UserError(cifar_line(spec, "its first convolution is 3×3", ours=False))
    if channels != 3:
        raise UserError(
            f"{spec}: its first convolution takes {channels} channel{'s' * (channels != 1)}, not 3: the networks here "
            "see RGB; give weights that were trained on colour images"
        )
    if kernel != [7, 7]:
        raise UserError(
            f"{spec}: its first convolution is {'×'.join(map(str, kernel))}, that of the networks here 7×7"
        )
    if not any(k.endswith("running_mean") for k in state):
        raise UserError(
            f"{spec}: its norms keep no statistics (GroupNorm, LayerNorm, or batch norms folded into scales); "
            "the networks here have batch norm"
        )
    blocks = tuple(len({k.split(".")[1] for k in state if k.startswith(f"layer{n}.")}) for n in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in state
    conv2 = state.get("layer1.0.conv2.weight")
    groups = conv2.shape[0] // conv2.shape[1] if conv2 is not None else 1
    width = conv2.shape[0] // groups * 64 // planes if conv2 is not None and groups else 64
    shape = (blocks, groups, width)
    for arch, (block, counts, arch_planes, arch_groups, arch_width) in ARCHS.items():
        known = (counts, arch_groups, arch_width)
        if (block.expansion == 4) == bottleneck and known == shape and arch_planes == planes:
            return arch
    kind = "bottleneck" if bottleneck else "basic"
    name = next((f"a {n}: " for n, known in FAMILY.items() if bottleneck and known == shape), "")
    raise UserError(
        f"{spec}: {name}its body (blocks {blocks}, {kind}, width {planes}, groups {groups} of {width}) is none of "
        f"{', '.join(ARCHS)}"
        + ("" if name else "; an incomplete file, or a network this project does not know")
    )


def cifar_line(spec: str, why: str, ours: bool = True) -> str:
    """What is said of a network for 32-pixel images; `ours`: one that pretrain/run.py wrote."""
    where = (
        "evaluate it with pretrain/evaluate.py"
        if ours
        else "pretrain/evaluate.py takes those of pretrain/run.py"
    )
    return f"{spec}: a CIFAR network ({why}): no transfer task takes it; {where}"


def check_body(wanted: dict[str, Tensor], state: dict[str, Tensor], arch: str, spec: str) -> None:
    """Raise UserError unless `state` is a full, finite, trained match of `wanted` (`num_batches_tracked` aside)."""
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked") or k not in wanted}
    odd = [k for k, v in state.items() if v.layout != torch.strided or v.is_quantized or v.is_complex()]
    problems = []
    for what, keys in (
        ("missing", [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]),
        ("unexpected", [k for k in state if k not in wanted]),
        ("misshapen", [k for k in state if k in wanted and state[k].shape != wanted[k].shape]),
        ("sparse, quantised or complex", odd),
        ("not finite", [k for k in state if k not in odd and not torch.isfinite(state[k].float()).all()]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{' …' if keys[3:] else ''})")
    if problems:
        raise UserError(
            f"{spec}: not a whole body of a {arch}: {'; '.join(problems)}; give a complete checkpoint"
        )
    means = [k for k in state if k.endswith("running_mean")]
    if all(not state[k].any() and ((state[k[:-4] + "var"] - 1).abs() < 1e-4).all() for k in means):
        scales = [state[k.replace("running_mean", "weight")] for k in means]
        if not all(((scale == 0) | (scale == 1)).all() for scale in scales):
            raise UserError(
                f"{spec}: its batch norms are frozen without statistics (mean 0, variance 1, folded into their scales, "
                "as in Caffe's and detectron2's weights): what they read cannot be checked and they cannot train; give "
                "weights with their statistics, e.g. those converted from torchvision's"
            )
        raise UserError(
            f"{spec}: its batch-norm statistics were never trained; use scratch:{arch} for random weights"
        )
