"""Other libraries' names of a ResNet: the same features bit for bit, read as they were trained, or one true line."""

import pickle
from collections.abc import Iterator

import pytest
import torch
import torchvision
from torch import nn

from backbench.common.backbones.load import IMAGENET_MEAN, IMAGENET_STD, load_backbone, load_classifier
from backbench.common.backbones.resnet import Trunk
from backbench.common.base.errors import UserError

CAFFE_STD = (1 / 255,) * 3


def model(arch: str, seed: int = 0) -> nn.Module:
    """torchvision's network with statistics that are not the initial ones."""
    torch.manual_seed(seed)
    made = getattr(torchvision.models, arch)(num_classes=5)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return made.eval()


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {arch: model(arch) for arch in ("resnet18", "resnet50")}


def parts(state: dict) -> Iterator[tuple]:
    """(stage 0 to 4, block, conv or bn, number, ending, tensor) of each tensor of a body; a shortcut's number is 0."""
    for key, value in state.items():
        names = key.split(".")
        if names[0] in ("conv1", "bn1"):
            yield 0, 0, names[0][:-1], 1, names[-1], value
        elif names[0] != "fc":
            shortcut = names[2] == "downsample"
            kind = ("conv", "bn")[int(names[3])] if shortcut else names[2][:-1]
            yield (
                int(names[0][-1]),
                int(names[1]),
                kind,
                0 if shortcut else int(names[2][-1]),
                names[-1],
                value,
            )


def detectron2(state: dict) -> dict:
    """modeling/backbone/resnet.py, without num_batches_tracked, as its FrozenBatchNorm2d is."""
    made = {}
    for stage, block, kind, number, ending, value in parts(state):
        if ending != "num_batches_tracked":
            layer = f"conv{number}" if number else "shortcut"
            place = f"res{stage + 1}.{block}.{layer}" if stage else "stem.conv1"
            made[f"{place}.{'norm.' * (kind == 'bn')}{ending}"] = value
    return made


def detectron2s_converter(state: dict) -> dict:
    """tools/convert-torchvision-to-d2.py, in the steps that it takes."""
    made = {}
    for key, value in state.items():
        if "layer" not in key:
            key = "stem." + key
        for t in (1, 2, 3, 4):
            key = key.replace(f"layer{t}", f"res{t + 1}")
        for t in (1, 2, 3):
            key = key.replace(f"bn{t}", f"conv{t}.norm")
        key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        made[key] = value.numpy()
    return made


def maskrcnn_benchmark(state: dict) -> dict:
    return {k if k.startswith("layer") else f"stem.{k}": v for k, v in state.items() if k[:2] != "fc"}


def caffe(state: dict) -> dict:
    """KaimingHe/deep-residual-networks: res3b1_branch2a in the 101 layers, res3b_branch2a in the 50."""
    made = {}
    for stage, block, kind, number, ending, value in parts(state):
        which = {"conv": "res"}.get(kind) or ("bn" if ending.startswith("running") else "scale")
        if ending == "num_batches_tracked":
            continue
        if stage == 0:
            made[f"{'conv1' if kind == 'conv' else which + '_conv1'}.{ending}"] = value
            continue
        letter = f"b{block}" if stage == 3 and block else "abcdef"[block]
        branch = f"2{' abc'[number]}" if number else "1"
        made[f"{which}{stage + 1}{letter}_branch{branch}.{ending}"] = value
    return made | {f"fc1000.{k[3:]}": v for k, v in state.items() if k[:2] == "fc"}


def huggingface(state: dict) -> dict:
    """transformers/models/resnet/modeling_resnet.py."""
    made = {}
    for stage, block, kind, number, ending, value in parts(state):
        what = {"conv": "convolution", "bn": "normalization"}[kind]
        layer = f"layer.{number - 1}" if number else "shortcut"
        place = f"encoder.stages.{stage - 1}.layers.{block}.{layer}" if stage else "embedder.embedder"
        made[f"resnet.{place}.{what}.{ending}"] = value
    return made | {f"classifier.1.{k[3:]}": v for k, v in state.items() if k[:2] == "fc"}


def layer0(state: dict) -> dict:
    moved = {
        f"layer0.{k}" if k[:5] in ("conv1", "bn1.w", "bn1.b", "bn1.r", "bn1.n") else k: v
        for k, v in state.items()
    }
    return {k.replace("fc.", "last_linear.") if k[:2] == "fc" else k: v for k, v in moved.items()}


def numbered_layer0(state: dict) -> dict:
    names = {"conv1": "layer0.0", "bn1": "layer0.1"}
    return {
        ".".join([names.get(k.split(".")[0], k.split(".")[0]), *k.split(".")[1:]]): v
        for k, v in state.items()
    }


def last_linear(state: dict) -> dict:
    return {k.replace("fc.", "last_linear."): v for k, v in state.items()}


def put(prefix: str, state: dict) -> dict:
    return {prefix + k: v for k, v in state.items()}


PLAIN = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "bgr": False, "stride_in_1x1": False}
D2 = {"mean": (0.485, 0.456, 0.406), "std": CAFFE_STD, "bgr": True, "stride_in_1x1": True}
CAFFES = {**D2, "mean": (0.48146, 0.45469, 0.40384)}
d2_mean = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)}
d2_rgb = {
    "pixel_mean": torch.tensor([123.675, 116.28, 103.53]),
    "pixel_std": torch.tensor([58.395, 57.12, 57.375]),
}
FILES = {  # what the library writes, and how those weights read an image
    "HuggingFace": (huggingface, PLAIN),
    "HuggingFace, the body alone": (
        lambda s: {k.removeprefix("resnet."): v for k, v in huggingface(s).items()},
        PLAIN,
    ),
    "layer0 and last_linear": (layer0, PLAIN),
    "layer0 in numbers": (numbered_layer0, PLAIN),
    "last_linear": (last_linear, PLAIN),
    "detectron2, a detector": (
        lambda s: {
            "model": put("backbone.bottom_up.", detectron2(s))
            | {
                "backbone.fpn_lateral2.weight": torch.ones(2),
                "proposal_generator.rpn_head.conv.bias": torch.ones(2),
            },
            "iteration": 3,
        },
        D2,
    ),
    "detectron2, its mean in the file": (
        lambda s: {"model": put("backbone.", detectron2(s)) | d2_mean | {"pixel_std": torch.ones(3, 1, 1)}},
        D2,
    ),
    "detectron2, RGB": (lambda s: {"model": put("backbone.", detectron2(s)) | d2_rgb}, PLAIN),
    "maskrcnn-benchmark": (lambda s: {"model": put("module.backbone.body.", maskrcnn_benchmark(s))}, CAFFES),
    "Caffe": (caffe, CAFFES),
}


def expected(network: nn.Module, reading: dict) -> dict:
    """The body's state, and its stem reversed where the weights read BGR."""
    state = {k: v for k, v in network.state_dict().items() if k[:2] != "fc"}
    return {
        **state,
        "conv1.weight": state["conv1.weight"].flip(1) if reading["bgr"] else state["conv1.weight"],
    }


BOTTLENECKS = ("HuggingFace", "detectron2, a detector", "Caffe")


@pytest.mark.parametrize(
    ("library", "arch"), [(name, "resnet18") for name in FILES] + [(name, "resnet50") for name in BOTTLENECKS]
)
def test_names_of_other_libraries_give_equal_features(tmp_path, networks, library, arch):
    network = networks[arch]
    write, reading = FILES[library]
    torch.save(write(network.state_dict()), tmp_path / "x.pth")
    backbone = load_backbone(str(tmp_path / "x.pth"))
    bottleneck = hasattr(network.layer1[0], "conv3")
    strided = reading["stride_in_1x1"] and bottleneck
    assert (backbone.bgr, backbone.stride_in_1x1) == (reading["bgr"], strided)
    assert backbone.mean == pytest.approx(reading["mean"], abs=1e-4)
    assert backbone.std == pytest.approx(reading["std"], abs=1e-6)
    wanted = Trunk(backbone.arch, strided).eval()
    wanted.load_state_dict(expected(network, reading), strict=False)
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(backbone.trunk.eval()(images), wanted(images))
    if not reading["bgr"]:
        assert torch.equal(wanted(images), nn.Sequential(*list(network.children())[:-2])(images))
    elif library != "Caffe":
        assert any("read as " in line and "--no-bgr" in line for line in backbone.report)


@pytest.mark.parametrize("library", ["HuggingFace", "layer0 and last_linear", "last_linear", "Caffe"])
def test_their_classifiers_give_equal_logits(tmp_path, networks, library):
    network = networks["resnet18"]
    write, reading = FILES[library]
    torch.save(write(network.state_dict()), tmp_path / "x.pth")
    options = {"bgr": False, "stride_in_1x1": False} if reading["bgr"] else {}
    classifier, facts = load_classifier(tmp_path / "x.pth", classes=5, **options)
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(classifier.eval()(images), network(images))
    assert "bgr" not in facts  # an export of it reads RGB


@pytest.mark.parametrize("author", ["torchvision", "MOCO"])
def test_detectron2s_converted_weights_say_so(tmp_path, networks, author):
    """A pickle of numpy arrays, as its converter writes it."""
    network = networks["resnet18"]
    content = {"model": detectron2s_converter(network.state_dict()), "__author__": author}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({**content, "matching_heuristics": True}))
    classifier, facts = load_classifier(tmp_path / "R-50.pkl")
    images = torch.randn(1, 3, 48, 64)
    assert torch.equal(classifier.eval()(images), network(images))
    assert facts["mean"] == list(IMAGENET_MEAN) and not facts["stride_in_1x1"]


def test_flags_override_what_the_library_does(tmp_path, networks):
    network = networks["resnet50"]
    torch.save({"model": detectron2(network.state_dict())}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    plain = load_backbone(path, bgr=False, stride_in_1x1=False, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    torch.save(network.state_dict(), tmp_path / "y.pth")
    assert plain.fingerprint == load_backbone(str(tmp_path / "y.pth")).fingerprint
    assert plain.fingerprint != load_backbone(path).fingerprint


def frozen(state: dict) -> dict:
    """Statistics folded into the scales, as detectron2's own weights have them."""
    changes = {"running_mean": torch.zeros_like, "running_var": lambda v: torch.ones_like(v) - 1e-5}
    kept = {k: changes.get(k.rpartition(".")[2], lambda v: v)(v) for k, v in state.items()}
    return {k: v * 0.7 if k.endswith("bn1.weight") else v for k, v in kept.items()}


REFUSED = {
    "a detector of detectron2's zoo": (
        lambda s: detectron2(frozen(s)),
        "frozen without statistics.*give weights",
    ),
    "norms without statistics": (
        lambda s: {
            k: v for k, v in maskrcnn_benchmark(s).items() if "running" not in k and "tracked" not in k
        },
        "keep no statistics .*folded into scales",
    ),
    "folded batch norms": (
        lambda s: (
            {k: v for k, v in s.items() if "bn" not in k and "downsample.1" not in k}
            | {"layer1.0.conv1.bias": torch.ones(64)}
        ),
        "layer1.0.conv1.bias: its batch norms are folded",
    ),
    "Detectron's": (
        lambda _: {"blobs": {"conv1_w": torch.ones(64, 3, 7, 7), "res2_0_branch2a_w": torch.ones(2)}},
        "Detectron's weights for Caffe2.*res2_0_branch2a_w",
    ),
    "CLIP's": (
        lambda s: put("visual.", s) | {"visual.attnpool.positional_embedding": torch.ones(50, 2048)},
        "CLIP's ResNet",
    ),
    "PaddlePaddle's": (
        lambda _: {"conv1._conv.weight": torch.ones(3), "bn._variance": torch.ones(3)},
        "PaddlePaddle",
    ),
    "pruned": (
        lambda s: {k.replace("conv1.weight", "conv1.weight_orig"): v for k, v in s.items()},
        "pruned with .*prune.remove",
    ),
    "weights in whole numbers": (
        lambda s: {**s, "layer1.0.conv1.weight": s["layer1.0.conv1.weight"].to(torch.int8)},
        r"layer1.0.conv1.weight holds whole numbers \(int8\)",
    ),
    "RegNet of HuggingFace": (
        lambda s: {
            k: v[..., :3, :3] if k.endswith("embedder.convolution.weight") else v
            for k, v in huggingface(s).items()
        },
        "no ResNet in it",
    ),
    "untrained in detectron2's names": (
        lambda s: detectron2(
            {
                k: torch.zeros_like(v) if "mean" in k else torch.ones_like(v) if "var" in k else v
                for k, v in s.items()
            }
        ),
        "never trained",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_such_network_gets_one_true_line(tmp_path, networks, what):
    write, message = REFUSED[what]
    torch.save(write(networks["resnet18"].state_dict()), tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as error:
        load_backbone(str(tmp_path / "x.pth"))
    assert "\n" not in str(error.value) and "x.pth" in str(error.value)
