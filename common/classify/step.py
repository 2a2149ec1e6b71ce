"""Training and testing a classifier: what pretraining and weakly supervised localisation share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbench.common.backbones.resnet import normalise
from backbench.common.base.progress import progress
from backbench.common.base.recipe import knob
from backbench.common.classify.crops import CropRecipe
from backbench.common.classify.feature_mixing import StageMixer
from backbench.common.classify.mixing import (
    METHODS,
    STAGES,
    MixingRecipe,
    mix,
    mix_labels,
    pair_mixer,
    parse_method,
)
from backbench.common.engine import autocast
from backbench.common.engine.loop import Step


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(MixingRecipe, CropRecipe):
    """A recipe that trains a classifier."""

    test_batch: int = knob(128, "images a prediction step", "I", stage="predict", low=1)


def make_step(recipe: ClassifyRecipe, classes: int, mean: Iterable[float], std: Iterable[float]) -> Step:
    """A training step: normalise and mix on the device, cross-entropy with soft labels.

    "accuracy" counts against the mixed label: the (unsmoothed) target's share of the predicted class. Nothing here
    waits for the device. `batch` holds "images", "labels" and, for a scheduled CutMix, "progress" in [0, 1).
    """
    mean, std = tuple(mean), tuple(std)
    smoothing = recipe.label_smoothing if "label_smoothing" in parse_method(recipe.method) else 0.0
    pair = pair_mixer(recipe.method)
    layers = recipe.mix_layers or (METHODS[pair].layers if pair else ())
    mixer = StageMixer(STAGES[layer] for layer in layers)

    def step(model: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        mixer.attach(model)
        images = normalise(batch["images"], mean, std)
        images, targets, pairing = mix(images, batch["labels"], classes, recipe, rng, batch.get("progress"))
        if pairing is None:
            logits = model(images).float()
        else:
            with mixer.at(pairing):
                logits = model(images).float()
            targets = mix_labels(targets, pairing.permutation, mixer.kept)
        accuracy = targets.gather(1, logits.detach().argmax(1, keepdim=True)).mean()
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=smoothing), "accuracy": accuracy}

    return step


@torch.inference_mode()
def predict_logits(
    model: nn.Module,
    images: np.ndarray,
    recipe: ClassifyRecipe,
    device: torch.device,
    mean: Iterable[float],
    std: Iterable[float],
) -> np.ndarray:
    """Logits float32 (n, C) of uint8 images (n, H, W, 3)."""
    model.to(device).eval()
    mean, std = tuple(mean), tuple(std)
    outputs = []
    for start in progress(range(0, len(images), recipe.test_batch), desc="predicting", unit="batch", delay=2):
        batch = torch.from_numpy(np.array(images[start : start + recipe.test_batch])).to(device)
        with autocast(recipe.eval_precision, device):
            outputs.append(model(normalise(batch, mean, std)).float())
    return torch.cat(outputs).cpu().numpy()
