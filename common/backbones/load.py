"""Any ResNet-family checkpoint → a Trunk with exactly its weights, or one line that says why not.

The backbone file (`save_backbone`) is a `torch.save` of plain types and tensors, read with `weights_only=True`: no
file that is given to this module can run code. Anything short of a full match of the body is refused: a wrong key
prefix that silently trains a random backbone is the complaint the field knows best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbench.common.backbones.checkpoint import read_checkpoint, tensors_of
from backbench.common.backbones.declared import contradiction, declared_input
from backbench.common.backbones.dialects import to_torchvision
from backbench.common.backbones.find_resnet import check_body, cifar_line, find_resnet, recognise
from backbench.common.backbones.resnet import ARCHS, Classifier, Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, file_and_choice, write_atomic

FORMAT = "backbench-backbone-1"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's


@dataclass
class Backbone:
    """A Trunk with its weights and what is known about them."""

    trunk: Trunk
    arch: str
    name: str  # its label in result paths
    group: str  # rows of one group are pretraining seeds of one method
    method: str
    fingerprint: str  # of the body's tensors and of how they read their input
    source: str  # as given on the command line
    mean: tuple[float, ...] = IMAGENET_MEAN  # normalisation that the weights want, of RGB/255
    std: tuple[float, ...] = IMAGENET_STD
    input_size: int = 224
    pretrain_seed: int | None = None
    scratch: bool = False  # random weights: no task freezes anything of them
    stride_in_1x1: bool = False
    bgr: bool = (
        False  # the weights were made for BGR: the first layer's channels are reversed, so they read RGB here
    )
    report: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)  # `fc.weight` and `fc.bias`, if it has them
    facts: dict[str, Any] = field(default_factory=dict)  # what its file says of itself


def load_backbone(
    spec: str,
    *,
    arch: str | None = None,
    name: str | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    stride_in_1x1: bool | None = None,
    bgr: bool | None = None,
    weights: str | None = None,
    leave_out: Sequence[str] = (),
) -> Backbone:
    """Load `FILE[#WEIGHTS]`, `torchvision:NAME`, `timm:NAME` or `scratch[:ARCH]` (random weights drawn from `seed`).

    `arch` is needed by `scratch`; files are recognised by their keys and shapes, and a contradiction is refused, be it
    with `arch` or with what the file says of itself; `arch` overrides the latter. `weights` says which of several
    networks in a file is taken (ema, raw, student, teacher … or a key prefix), `leave_out` which modules beside the
    body may be left out though they are no known head.
    `mean` and `std` (of RGB/255), `stride_in_1x1` (a bottleneck's stride stands there) and `bgr` (the weights were
    trained on BGR) override what the file says or the library whose names it has; all four are part of the fingerprint.
    Raises UserError for anything but a full, finite, trained body.
    """
    kind, _, rest = spec.partition(":")
    if kind == "scratch":
        if weights:
            raise UserError(f"{spec}: random weights are one network; drop --weights")
        arch = rest or arch or "resnet50"
        return _scratch(arch, spec, name, seed, mean, std, bool(stride_in_1x1), bgr)
    model, content = None, {}
    if kind in ("torchvision", "timm") and rest:
        model, facts = _from_library(kind, rest)
        tensors = model.state_dict()
    else:
        rest = ""
        path, choice = file_and_choice(spec)
        weights = weights or choice
        tensors, facts, content = _from_file(Path(path).expanduser())
    if facts.get("arch") and facts["arch"] not in ARCHS:
        raise UserError(cifar_line(spec, facts["arch"]))
    tensors, own, said_of_names = to_torchvision(tensors, content, spec)
    facts = {**own, **facts}
    network = find_resnet(tensors, spec, weights, tuple(leave_out))
    body, notes = network.body, network.notes + said_of_names
    found = recognise(body, spec)
    for declared in (facts.get("arch"), arch):
        if declared and declared != found:
            raise UserError(
                f"{spec}: its weights are a {found}, not a {declared}; drop --arch or give the right file"
            )
    notes += _believe(content, found, arch, spec)
    if stride_in_1x1 is None:
        stride_in_1x1 = bool(facts.get("stride_in_1x1"))  # an export says it of itself
    if bgr is None:
        bgr = bool(facts.get("bgr"))
    facts.pop("bgr", None)  # true of the file, not of the trunk
    trunk = _trunk(found, stride_in_1x1, spec)
    wanted = trunk.state_dict()
    check_body(wanted, body, found, spec)
    trunk.load_state_dict({k: body[k].reshape(v.shape) if k in body else v for k, v in wanted.items()})
    if model is not None:
        _check_features(model, trunk, spec)
    if bgr:
        trunk.conv1.weight.data = trunk.conv1.weight.data.flip(1)
        notes.append("BGR weights: the first layer's input channels are reversed, to read RGB")
    label = facts.get("method") or (f"{kind}-{rest}" if rest else Path(path).name.split(".")[0])
    label += f"-{network.choice}" if network.choice else ""
    seed_of_file = facts.get("seed")
    mean, std, said = _normalisation(facts, mean, std)
    _check_normaliser(network.normaliser, mean, std, spec)
    return Backbone(
        trunk=trunk,
        arch=found,
        name=name or (f"{label}-p{seed_of_file}" if seed_of_file else label).replace("/", "_"),
        group=facts.get("method") or name or label,
        method=facts.get("method") or label,
        fingerprint=_fingerprint(body_fingerprint(trunk), mean, std, stride_in_1x1),
        source=spec,
        mean=mean,
        std=std,
        input_size=int(facts.get("size", 224)),
        pretrain_seed=seed_of_file,
        stride_in_1x1=stride_in_1x1,
        bgr=bgr,
        report=notes + said + (["stride in the 1×1 convolutions"] if stride_in_1x1 else []),
        head=network.head,
        facts=facts,
    )


def load_classifier(
    spec: str | Path, *, classes: int | None = None, **options: Any
) -> tuple[Classifier, dict[str, Any]]:
    """A whole classifier (body and `fc`) of anything `load_backbone` takes (`scratch` aside), and what is known of it.

    `options` are `load_backbone`'s. The facts hold a backbone file's own (see `save_backbone`) and always arch,
    num_classes, method, mean, std, size, report and fingerprint. Raises UserError as `load_backbone`, when there is
    no linear classifier, and when it has not `classes` classes.
    """
    backbone = load_backbone(str(spec), **options)
    head = backbone.head
    if not head:
        raise UserError(f"{spec}: has no classifier (fc.weight) beside its body; give a file that has one")
    count, width = head["fc.weight"].shape
    if width != backbone.trunk.channels["layer4"] or not all(torch.isfinite(v).all() for v in head.values()):
        raise UserError(
            f"{spec}: its classifier does not fit its body, or is not finite; give a complete checkpoint"
        )
    if classes not in (None, count):
        raise UserError(
            f"{spec}: classifies {count} classes, the data has {classes}; give the data it was trained for"
        )
    classifier = Classifier(backbone.trunk, count)
    classifier.fc.load_state_dict({k.removeprefix("fc."): v for k, v in head.items()})
    known = {
        "arch": backbone.arch,
        "num_classes": count,
        "method": backbone.method,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "size": backbone.input_size,
        "stride_in_1x1": backbone.stride_in_1x1,
        "report": backbone.report,
        "fingerprint": backbone.fingerprint,
    }
    return classifier, {**backbone.facts, **known}


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


def _fingerprint(body: str, mean: Sequence[float], std: Sequence[float], stride_in_1x1: bool) -> str:
    """The body's own under the usual reading, so that a file's cells keep their keys; another reading is digested."""
    if (tuple(mean), tuple(std), stride_in_1x1) == (IMAGENET_MEAN, IMAGENET_STD, False):
        return body
    return digest(body, list(mean), list(std), stride_in_1x1)


def _normalisation(
    facts: dict[str, Any], mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...], list[str]]:
    """(mean, std, what to say of it): the override, else what the file says, else ImageNet's."""
    said = [
        f"input {what} {', '.join(f'{v:.4g}' for v in values)} as asked for"
        for what, values in (("mean", mean), ("deviation", std))
        if values
    ]
    mean = tuple(float(v) for v in mean or facts.get("mean") or IMAGENET_MEAN)
    std = tuple(float(v) for v in std or facts.get("std") or IMAGENET_STD)
    return mean, std, said


def _trunk(arch: str, stride_in_1x1: bool, spec: str) -> Trunk:
    trunk = Trunk(arch, stride_in_1x1)
    if stride_in_1x1 and not trunk.has_1x1:
        raise UserError(f"{spec}: a {arch} has no 1×1 convolution to stride in; drop --stride-in-1x1")
    return trunk


def _believe(content: Mapping[str, Any], found: str, arch: str | None, spec: str) -> list[str]:
    """What to say where a file contradicts that it is a plain `found`. Raises UserError unless `arch` overrides it."""
    says = contradiction(content, found)
    if says and not arch:
        raise UserError(
            f"{spec}: its weights have the names and shapes of a {found}, but it says of itself that {says}; if it is "
            f"a plain {found} all the same, say --arch {found}"
        )
    return [f"read as a plain {found} as asked for, though the file says that {says}"] if says else []


def _check_normaliser(
    own: dict[str, list[float]], mean: Sequence[float], std: Sequence[float], spec: str
) -> None:
    """Raise UserError where the network normalises its input itself, otherwise than it will be done here."""
    for what, given in (("mean", mean), ("std", std)):
        values = own.get(what, list(given))
        values = [v / 255 for v in values] if max(values) > 2 else values
        if any(abs(a - b) > 1e-3 for a, b in zip(values, given)):
            flag = f"--input-{what} {','.join(f'{v:.6g}' for v in values)}"
            raise UserError(f"{spec}: its network takes {what} {own[what]} of its input itself; say {flag}")


def _from_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """(tensors, facts, the whole content where it is a stranger's file)."""
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, a dict of tensors was expected")
    if "format" in content and "state_dict" in content:
        facts = {k: v for k, v in content.items() if k != "state_dict"}
        if facts["format"] != FORMAT:
            raise UserError(
                f"{path}: format {facts['format']!r} is unknown here ({FORMAT} is read): update backbench"
            )
        return tensors_of(content["state_dict"]), facts, {}
    return tensors_of(content), declared_input(content), content


def _from_library(kind: str, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A pretrained model of torchvision (NAME or NAME.WEIGHTS) or timm (NAME or NAME.TAG) and what it wants."""
    try:
        if kind == "torchvision":
            from torchvision.models import get_model, get_model_weights

            name, _, tag = name.partition(".")
            weights = get_model_weights(name)[tag or "DEFAULT"]
            asked = weights.transforms()
            facts = {"mean": asked.mean, "std": asked.std, "size": asked.crop_size[0]}
            return get_model(name, weights=weights, progress=False).eval(), facts
        import timm

        model = timm.create_model(name, pretrained=True).eval()
        asked = model.pretrained_cfg
        return model, {"mean": asked["mean"], "std": asked["std"], "size": asked["input_size"][1]}
    except ImportError:
        raise UserError(f"{kind}:{name}: needs the package timm (pip install 'backbench[interop]')") from None
    except Exception as error:  # each library has errors of its own for an unknown name and for no network
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{kind}:{name}: cannot be had ({first[:160]}); check the name and the network, "
            "or fetch the file elsewhere and give its path"
        ) from None


@torch.inference_mode()
def _check_features(model: nn.Module, trunk: Trunk, spec: str) -> None:
    """Refuse a library's network that has this body's weights, but other layers between them (resnetblur50 …)."""
    images = torch.linspace(-2, 2, 3 * 64 * 64).sin().mul(2).view(1, 3, 64, 64)
    if hasattr(model, "forward_features"):
        theirs = model.forward_features(images)
    else:
        theirs = nn.Sequential(*list(model.children())[:-2])(images)
    mode = trunk.training
    ours = trunk.eval()(images)
    trunk.train(mode)
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > 1e-3 * theirs.abs().max():
        raise UserError(
            f"{spec}: has the weights of a {trunk.arch} but other layers between them, for its features differ; "
            f"take the plain {trunk.arch}"
        )


def _scratch(arch: str, spec: str, name: str | None, seed: int, mean, std, stride_in_1x1, bgr) -> Backbone:
    if arch not in ARCHS:
        raise UserError(f"{spec}: no architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    if bgr:
        raise UserError(f"{spec}: random weights know no channel order; drop --bgr")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = _trunk(arch, stride_in_1x1, spec)
    mean, std, said = _normalisation({}, mean, std)
    return Backbone(
        trunk=trunk,
        arch=arch,
        name=name or "scratch",
        group=name or "scratch",
        method="scratch",
        fingerprint=_fingerprint(digest("scratch", arch), mean, std, stride_in_1x1),
        source=spec,
        mean=mean,
        std=std,
        scratch=True,
        stride_in_1x1=stride_in_1x1,
        report=["random weights: nothing is frozen and batch norm trains", *said],
    )
