"""A finished run as a network again: what `model.json` and `weights.pt` of its folder hold."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbench.common.backbones.load import Backbone
from backbench.common.backbones.resnet import ARCHS, Classifier, Trunk, normalise
from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_json
from backbench.common.data.decode import centre_crop, resize
from backbench.common.run.cell import Run
from backbench.wsol.boxes import crop_window
from backbench.wsol.cam import class_maps

FORMAT = 1


def wsol_model(trunk: Trunk, classes: int) -> Classifier:
    """The paper's network: layer4 at stride 1, a new classifier."""
    model = Classifier(trunk, classes)
    model.trunk.unstride("layer4")
    return model


def write_model(run: Run, backbone: Backbone, classes: list[str], threshold: float) -> None:
    """Write model.json: with weights.pt, enough to predict."""
    facts = {
        "format": FORMAT,
        "arch": backbone.arch,
        "stride_in_1x1": backbone.stride_in_1x1,
        "classes": classes,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "resize": run.recipe.resize,
        "size": run.recipe.size,
        "resize_backend": run.recipe.resize_backend,
        "threshold": threshold,
        "backbone": backbone.name,
        "method": run.recipe.method,
        "data": run.identity.data,
        "seed": run.identity.seed,
    }
    write_json(run.folder / "model.json", facts)


@dataclass
class Predictor:
    """A trained network and how it reads images."""

    folder: Path
    model: Classifier
    facts: dict[str, Any]
    device: torch.device

    @property
    def classes(self) -> list[str]:
        return self.facts["classes"]

    @property
    def window(self) -> np.ndarray:
        """The part of an image that its maps show: (4,) in shares."""
        return crop_window(self.facts["resize"], self.facts["size"])

    def read(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 (H, W, 3) of any size as the test crop (size, size, 3)."""
        side, size = self.facts["resize"], self.facts["size"]
        return centre_crop(resize(image, (side, side), self.facts["resize_backend"]), (size, size))

    def normalised(self, crops: np.ndarray) -> Tensor:
        """Crops uint8 (n, size, size, 3) → the network's input."""
        batch = torch.from_numpy(np.ascontiguousarray(crops)).to(self.device)
        return normalise(batch, self.facts["mean"], self.facts["std"])

    def pixels(self, images: Tensor) -> np.ndarray:
        """The network's input (n, 3, size, size) as uint8 crops again."""
        mean, std = (
            torch.tensor(self.facts[k], device=images.device).view(1, 3, 1, 1) for k in ("mean", "std")
        )
        values = (images * std + mean).mul(255).round().clamp(0, 255).byte()
        return values.permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def maps(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Network input → probabilities (n, K) and the maps of all classes (n, K, h, w), float32."""
        features = self.model.trunk(images).float()
        every = torch.arange(len(self.classes), device=images.device).expand(len(images), -1)
        maps = class_maps(features, self.model.fc.weight, every)
        logits = maps.mean((2, 3)) + self.model.fc.bias
        return logits.softmax(1).cpu().numpy(), maps.cpu().numpy()


def load_predictor(folder: Path, device: torch.device) -> Predictor:
    """Read a run folder of wsol/finetune.py. Raises UserError naming what is missing or does not fit."""
    if not (folder / "model.json").is_file() or not (folder / "weights.pt").is_file():
        raise UserError(
            f"{folder}: no finished run of wsol/finetune.py (it has no model.json or no weights.pt); "
            "run its command again"
        )
    facts = read_json(folder / "model.json")
    if facts.get("format") != FORMAT or facts.get("arch") not in ARCHS:
        raise UserError(
            f"{folder / 'model.json'}: format {facts.get('format')} or network {facts.get('arch')} is unknown here"
        )
    model = wsol_model(Trunk(facts["arch"], facts["stride_in_1x1"]), len(facts["classes"]))
    try:
        state = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)["model"]
        model.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder / 'weights.pt'}: does not fit model.json ({reason})") from None
    return Predictor(folder, model.to(device).eval(), facts, device)


def shares_of(image: np.ndarray) -> np.ndarray:
    """A map (h, w) scaled to [0, 1]; a constant one is all 0."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else np.zeros_like(image)
