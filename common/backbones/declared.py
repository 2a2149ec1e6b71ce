"""What a checkpoint says of its own architecture, in `arch`, `args`, `config` …, and whether that is the plain ResNet.

A blur pool, another activation or a dilated stage leaves names and shapes of the weights as they are: the plain network
takes them without a word and loses points. What the file says of itself is all there is to tell them apart, so it is
believed.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from typing import Any

CONTAINERS = {  # where training code writes its settings
    *("args", "opt", "opts", "options", "config", "configs", "cfg", "conf", "hparams", "hyper_parameters"),
    *(
        "model_args",
        "model_kwargs",
        "model_config",
        "model_cfg",
        "meta",
        "params",
        "pretrained_cfg",
        "init_args",
    ),
    *("backbone_args", "backbone_kwargs", "network_args", "encoder_args"),
}
MODEL_ARGUMENTS = {
    "model_args",
    "model_kwargs",
    "backbone_args",
    "backbone_kwargs",
    "network_args",
    "encoder_args",
}
NAMES = {  # whose value is the name of an architecture
    *("arch", "arch_name", "architecture", "architectures", "model_arch", "model_name", "net_type", "net"),
    *(
        "network",
        "model",
        "backbone",
        "backbone_name",
        "backbone_arch",
        "base_model",
        "base_encoder",
        "encoder",
    ),
    *("encoder_name", "encoder_arch", "cnn", "cnn_name"),
}
WITHIN = {"name", "type", "_target_", "class_path", "model_type"}  # the same, inside the settings of a model
ELSEWHERE = {  # settings that are not the body's
    *(
        "head",
        "heads",
        "neck",
        "projector",
        "predictor",
        "decoder",
        "optimizer",
        "optim",
        "scheduler",
        "lr_scheduler",
    ),
    *(
        "loss",
        "criterion",
        "data",
        "dataset",
        "transform",
        "augmentation",
        "aug",
        "train_cfg",
        "test_cfg",
        "trainer",
    ),
    *("callbacks", "logger", "data_preprocessor"),
}
ONLY_WITHIN = {"act", "norm", "pool", "blur", "preact"}  # elsewhere they may be an augmentation's
MODELS = {"model", "backbone", "network", "net", "encoder", "arch"}
# words of a name that say nothing of the layers: methods, data, sources of weights
SILENT = (
    r"moco[-_ ]?(v?[123])?|simclr[-_ ]?(v?[12])?|byol|dino(?!v2)|swav|simsiam|barlow[-_ ]?twins?|vicregl?|vicreg|nnclr|"
    r"sup(ervised)?[-_ ]?con(trast(ive)?)?|deepcluster[-_ ]?(v?2)?|pirl|infomin|densecl|supervised|baseline|vanilla|"
    r"cutmix|mixup|cutout|puzzlemix|co[-_ ]?mixup|resizemix|stylemix|tokenmix|autoaugment|randaugment|augmix|"
    r"imagenet(1k|21k|22k)?([-_]v[12])?|in(1k|21k|22k)|ilsvrc(2012)?|pretrained|torchvision|timm|tv|ssl|swsl|"
    r"gluon|mmpretrain|classifier|default"
)
PLAIN: dict[
    str, tuple[Any, ...]
] = {  # setting: the values that leave a ResNet as torchvision's, beside None and False
    "act_layer": ("relu",),
    "activation": ("relu",),
    "act": ("relu",),
    "nonlinearity": ("relu",),
    "norm_layer": ("batchnorm2d", "batchnorm", "bn", "batch", "syncbn", "syncbatchnorm"),
    "norm": ("batchnorm2d", "batchnorm", "bn", "batch", "syncbn", "syncbatchnorm"),
    "gp": ("avg", "fast", "fastavg"),
    "global_pool": ("avg", "fast", "fastavg"),
    "pool": ("avg", "gap"),
    "output_stride": (32,),
    "bn_eps": (1e-5,),
    "aa_layer": (),
    "blur": (),
    "antialias": (),
    "avg_down": (),
    "deep_stem": (),
    "stem_type": ("",),
    "stem_width": (64,),
    "attn_layer": (),
    "block_args": (),
    "split_bn": (),
    "replace_stem_pool": (),
    "replace_stride_with_dilation": (),
    "padding_mode": ("zeros",),
    "conv_layer": ("conv2d",),
    "weight_standardization": (),
    "cifar_stem": (),
    "preact": (),
}
HARMLESS = {  # arguments of a model that change nothing of what a trained body computes
    *("num_classes", "n_classes", "pretrained", "pretrain", "weights", "progress", "in_chans", "in_channels"),
    *(
        "drop_rate",
        "drop_path_rate",
        "drop_path",
        "dropout",
        "drop_block_rate",
        "drop_block",
        "zero_init_last",
    ),
    *(
        "zero_init_residual",
        "zero_init_last_gamma",
        "bn_momentum",
        "checkpoint_path",
        "norm_eval",
        "frozen_stages",
    ),
    *("groups", "width_per_group", "cardinality", "base_width", "depth", "layers", "block", "dim", "out_dim"),
    *("bn_tf", "scriptable", "exportable", "features_only", "num_layers", "use_checkpoint", "embed_dim"),
    *("hidden_dim", "out_features", "projection_dim", "head_dim", "mean", "std", "input_size", "img_size"),
}


def contradiction(content: Mapping[str, Any], arch: str) -> str | None:
    """What the file says of itself that a plain `arch` is not, e.g. "args.act_layer is 'silu'"; None when it agrees."""
    for path, key, value, within in _settings(content):
        if key in NAMES or (within and key in WITHIN):
            names = value if isinstance(value, list | tuple) else [value]
            for name in names:
                if isinstance(name, str) and not _plain(name, arch, soft=key in WITHIN):
                    return f"{path} is {name!r}"
        elif key in PLAIN:
            if (within or key not in ONLY_WITHIN) and not _off(value) and _word(value) not in PLAIN[key]:
                return f"{path} is {value!r}"
        elif MODEL_ARGUMENTS & set(path.split(".")[-2:-1]) and key not in HARMLESS and not _off(value):
            return f"{path} is {value!r}"
    return None


def declared_input(content: Mapping[str, Any]) -> dict[str, Any]:
    """mean, std and size of the input where timm's `pretrained_cfg` or `args` states them; {} otherwise."""
    facts: dict[str, Any] = {}
    for config in map(content.get, ("args", "pretrained_cfg")):
        config = vars(config) if isinstance(config, argparse.Namespace) else config
        if isinstance(config, Mapping):
            facts |= {k: config[k] for k in ("mean", "std") if _shares(config.get(k))}
            if isinstance(config.get("input_size"), list | tuple) and len(config["input_size"]) == 3:
                facts["size"] = int(config["input_size"][1])
    return facts


def _shares(value: Any) -> bool:
    """Three numbers, in shares of 255."""
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value)
    return numbers and len(value) == 3 and all(0 <= v <= 1 for v in value)


def _settings(
    content: Mapping[str, Any], path: str = "", within: bool = False, depth: int = 0
) -> Iterator[tuple[str, str, Any, bool]]:
    """(dotted path, key, value, whether it stands among a model's settings) of every plain setting."""
    for key, value in content.items():
        if isinstance(value, argparse.Namespace):
            value = vars(value)
        if not isinstance(key, str):
            continue
        name = key.lower()
        if isinstance(value, Mapping):
            if depth < 5 and (depth or name in CONTAINERS) and name not in ELSEWHERE:
                yield from _settings(
                    value, f"{path}{key}.", within or name in MODELS | MODEL_ARGUMENTS, depth + 1
                )
        elif isinstance(value, str | int | float | bool | list | tuple) or value is None:
            yield f"{path}{key}", name, value, within


def _off(value: Any) -> bool:
    """None, False, zero, nothing, or a list of these."""
    return (
        all(map(_off, value)) if isinstance(value, list | tuple) else not value or value in ("none", "None")
    )


def _word(value: Any) -> Any:
    """`torch.nn.ReLU` and "ReLU" as "relu"."""
    return value.lower().rpartition(".")[2].replace("_", "") if isinstance(value, str) else value


def _plain(name: str, arch: str, soft: bool) -> bool:
    """Whether a name is that of the plain `arch`, or names no architecture at all."""
    text = name.lower().strip()
    tagged = re.fullmatch(r"([a-z]\w*\d\w*)\.\w+", text)  # timm's NAME.TAG; else a class in its module
    text = tagged[1] if tagged else text.rpartition(".")[2]
    text = re.sub(rf"(^|[-_ .]|(?<=\d))({SILENT})(?=$|[-_ .]|resne)", " ", text)
    text = re.sub(r"[^a-z0-9]+", "", text)
    if not text:
        return True
    depth = re.search(r"\d+", arch).group()
    short = arch.split("_")[0]
    known = {arch.replace("_", ""), short, "resnext" if short.startswith("resnext") else "resnet"}
    if short == f"resnet{depth}" and arch == short:
        known |= {f"r{depth}", f"rn{depth}", f"resnet{depth}v1", f"resnet{depth}v1b"}
        known |= {f"resnetv1{depth}"}
    return text in known or (soft and not re.search(r"res|net|vgg|vit|swin|dense|former|incept|conv", text))
