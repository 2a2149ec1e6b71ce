"""A checkpoint out again: as torchvision, timm, safetensors or ONNX read it, with the normalisation it wants."""

import io
import json
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbench.common.backbones.load import FORMAT, load_backbone, load_classifier
from backbench.common.backbones.resnet import ARCHS, Classifier
from backbench.common.base.errors import UserError
from backbench.common.base.files import make_folder, write_atomic, write_json

TARGETS = ("torchvision", "timm", "safetensors", "onnx")
PLAIN = (str, int, float, list)  # facts that go along


def export(spec: str, to: str, out: Path, **reading: Any) -> list[str]:
    """Write the checkpoint `spec` (anything `load_backbone` takes) to `out` for the library `to`, one of TARGETS.

    Weights are converted to what `reading` (`load_backbone`'s options) makes of them: those for BGR then read RGB. The
    file holds the classifier if there is one. Mean, std and size go into the file's metadata, for torchvision, whose
    state dicts have none, into `out`.json. Returns the lines that say how to read it. Raises UserError.
    """
    if spec.partition(":")[0] == "scratch":
        raise UserError(f"{spec}: random weights are not worth exporting; give a checkpoint")
    model, facts, report = _load(spec, reading)
    if facts["stride_in_1x1"] and to in ("torchvision", "timm"):
        raise UserError(
            f"{spec}: {to}'s {facts['arch']} strides in the 3×3 convolution; "
            "--to onnx or safetensors keeps --stride-in-1x1"
        )
    if to in ("torchvision", "timm") and facts["arch"] == "resnet18_half":
        raise UserError(
            f"{spec}: {to} has no resnet18_half, a width of this project; "
            "--to safetensors (torchvision's key names) or --to onnx"
        )
    make_folder(out.parent)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names a file")
    write = {"torchvision": _torchvision, "timm": _timm, "safetensors": _safetensors, "onnx": _onnx}[to]
    lines = write(model, facts, out)
    mean, std = (", ".join(f"{v:.4g}" for v in facts[k]) for k in ("mean", "std"))
    return [
        *lines,
        f"its input: RGB/255, less {mean}, over {std}, {facts['size']} px; taken: {'; '.join(report)}",
    ]


def _load(spec: str, reading: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """(model in eval mode, facts, report): a Classifier, or the Trunk alone, then with num_classes 0."""
    backbone = load_backbone(spec, **reading)
    if backbone.head:
        model, facts = load_classifier(spec, **reading)
    else:
        model, facts = backbone.trunk, {"arch": backbone.arch, "num_classes": 0, "method": backbone.method}
        facts |= {"mean": list(backbone.mean), "std": list(backbone.std), "size": backbone.input_size}
        facts["stride_in_1x1"] = backbone.stride_in_1x1
    facts = {k: v for k, v in facts.items() if isinstance(v, PLAIN) and k not in ("format", "report")}
    return model.eval(), facts, backbone.report


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.torchvision_state() if isinstance(model, Classifier) else model.state_dict()
    return {k: v.detach().cpu().contiguous() for k, v in state.items()}


def _torchvision(model: nn.Module, facts: dict[str, Any], out: Path) -> list[str]:
    arch, count = facts["arch"], facts["num_classes"]
    write_atomic(out, lambda file: torch.save(_state(model), file))
    write_json(out.with_name(out.name + ".json"), facts)
    if arch.startswith("resnext101_32x4d"):  # torchvision has the class, but not this size of it
        _, blocks, _, groups, width = ARCHS[arch]
        made = (
            f"ResNet(Bottleneck, {list(blocks)}, {count or 1000}, groups={groups}, width_per_group={width})"
        )
    else:
        made = f"torchvision.models.{arch}(num_classes={count or 1000})"
    lines = [f"model = {made}"] + (
        [] if count else ["model.fc = torch.nn.Identity()  # no classifier in the file"]
    )
    return [*lines, f"model.load_state_dict(torch.load({str(out)!r}))"]


def _timm(model: nn.Module, facts: dict[str, Any], out: Path) -> list[str]:
    arch, count, size = facts["arch"], facts["num_classes"], facts["size"]
    config = {"mean": facts["mean"], "std": facts["std"], "input_size": [3, size, size], "num_classes": count}
    config |= {"label_names": facts["classes"]} if "classes" in facts else {}
    content = {"state_dict": _state(model), "arch": arch, "pretrained_cfg": config}
    write_atomic(out, lambda file: torch.save(content, file))
    return [f"model = timm.create_model({arch!r}, num_classes={count}, checkpoint_path={str(out)!r})"]


def _safetensors(model: nn.Module, facts: dict[str, Any], out: Path) -> list[str]:
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--to safetensors: needs its package (pip install 'backbench[interop]')") from None
    data = save(
        _state(model), {"format": "pt", **_texts(facts), "backbench": json.dumps({"format": FORMAT, **facts})}
    )
    write_atomic(out, lambda file: file.write(data))
    return [f"state = safetensors.torch.load_file({str(out)!r})  # torchvision's names"]


def _onnx(model: nn.Module, facts: dict[str, Any], out: Path) -> list[str]:
    """Opset of torch's exporter; input "images" float32 (N, 3, H, W), normalised; any N, H and W."""
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it and says so at length
    except ImportError:
        raise UserError("--to onnx: needs onnx and onnxscript (pip install 'backbench[onnx]')") from None
    size = max(64, facts["size"])
    axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    name = "logits" if facts["num_classes"] else "features"
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=[name],
            dynamic_shapes=(axes,),
            verbose=False,
        )
    program.model.metadata_props.update(_texts(facts))
    write_atomic(out, lambda file: file.write(program.model_proto.SerializeToString()))
    return [f"session = onnxruntime.InferenceSession({str(out)!r})  # 'images' → {name!r}"]


def _texts(facts: dict[str, Any]) -> dict[str, str]:
    return {
        k: v if isinstance(v, str) else json.dumps(v)
        for k, v in facts.items()
        if k in ("mean", "std", "size", "arch", "classes")
    }
