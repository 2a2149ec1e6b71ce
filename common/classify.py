"""Training and testing a classifier: what pretraining and weakly supervised localisation share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.colour import colour_jitter, lighting
from common.data.decode import Fit, decode_all, read_rgb
from common.data.types import ImageSet
from common.engine import autocast
from common.engine.loop import Step
from common.errors import UserError
from common.mixing import METHODS, Mixing, mix
from common.progress import progress
from common.recipe import Recipe, knob
from common.trunk import normalise


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(Recipe):
    """A recipe that trains a classifier."""

    method: str = knob("baseline", "how batches are mixed", "P", choices=METHODS)
    alpha: float = knob(1.0, "λ ~ Beta(alpha, alpha) of Mixup and CutMix", "P")
    probability: float = knob(
        1.0, "share of batches that are mixed: 1 for ImageNet and WSOL, .5 for CIFAR", "C, A"
    )
    correct_lam: bool = knob(True, "λ set to the exact share of pixels kept, after clipping the box", "P, C")
    cutout_share: float = knob(0.5, "side of Cutout's square as a share of the image's", "P, X")
    size: int = knob(224, "side of the network's input in pixels", "P")
    resize: int = knob(
        256, "side to which images are resized before a centre crop (short side) or a shift crop", "C"
    )
    crop: str = knob(
        "random_resized",
        "training crop: random_resized (area .08–1, ratio 3/4–4/3) from the file, or shift: a size² window of a "
        "resize² square, decoded once",
        "P",
        choices=("random_resized", "shift"),
    )
    colour: str = knob(
        "none",
        "code: the official code's jitter .4 and lighting .1; the paper's text has none",
        "P, C",
        choices=("none", "code"),
    )
    test_batch: int = knob(128, "images a prediction step", "I", stage="predict")

    @property
    def mixing(self) -> Mixing:
        """The mixing method with its numbers."""
        return Mixing(self.method, self.alpha, self.probability, self.correct_lam, self.cutout_share)

    def check(self) -> None:
        """Refuse what cannot be trained. Raises UserError naming the field."""
        super().check()
        if not self.alpha > 0:
            raise UserError(f"recipe: alpha={self.alpha}, it must be above 0")
        if not 0 < self.cutout_share <= 1:
            raise UserError(
                f"recipe: cutout_share={self.cutout_share}, it must be in (0, 1]: a mask no larger than the image"
            )
        if self.size > self.resize:
            raise UserError(
                f"recipe: size={self.size} is larger than resize={self.resize}, nothing could be cropped"
            )
        if self.method != "baseline" and (self.micro_batch or self.batch) < 2 and self.method != "cutout":
            raise UserError(f"recipe: {self.method} mixes pairs, a micro-batch of 1 image has none")


class TrainImages:
    """Training images as uint8 crops with labels; see `ClassifyRecipe.crop`."""

    def __init__(self, images: ImageSet, recipe: ClassifyRecipe) -> None:
        self.images, self.recipe = images, recipe
        side = recipe.resize
        self.decoded = decode_all(images.paths, Fit(side, side)) if recipe.crop == "shift" else None
        self.workers = 0 if self.decoded is not None else 2

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int], rngs: list[np.random.Generator]) -> dict[str, Any]:
        """ "images" uint8 (N, size, size, 3), "labels" int64 (N,), "ids"."""
        crops = np.stack([self._one(index, rng) for index, rng in zip(indices, rngs)])
        return {
            "images": torch.from_numpy(crops),
            "labels": torch.from_numpy(self.images.labels[indices]),
            "ids": [str(self.images.ids[index]) for index in indices],
        }

    def _one(self, index: int, rng: np.random.Generator) -> np.ndarray:
        size = self.recipe.size
        if self.decoded is not None:
            x, y = rng.integers(self.recipe.resize - size + 1, size=2)
            crop = self.decoded[index, y : y + size, x : x + size]
        else:
            crop = random_resized_crop(read_rgb(self.images.paths[index]), size, rng)
        if self.recipe.colour == "code":
            crop = lighting(colour_jitter(crop, rng), rng)
        return crop[:, ::-1] if rng.random() < 0.5 else crop


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """uint8 (H, W, 3) → (size, size, 3): torchvision's RandomResizedCrop, antialiased bilinear."""
    height, width = image.shape[:2]
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:  # as torchvision: the central part of the nearest allowed ratio
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        x, y = (width - w) // 2, (height - h) // 2
    box = (x, y, x + w, y + h)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))


def test_images(images: ImageSet, recipe: ClassifyRecipe) -> np.ndarray:
    """uint8 (n, size, size, 3): the short side at `resize`, the centre kept; decoded once."""
    return decode_all(images.paths, Fit(recipe.size, recipe.size, short=recipe.resize))


def make_step(recipe: ClassifyRecipe, classes: int, mean: Iterable[float], std: Iterable[float]) -> Step:
    """A training step: normalise and mix on the device, cross-entropy with soft labels.

    "accuracy" counts against the mixed label: the target's share of the predicted class.
    """
    mixing, mean, std = recipe.mixing, tuple(mean), tuple(std)

    def step(model: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        images = normalise(batch["images"], mean, std)
        images, targets = mix(images, batch["labels"], classes, mixing, rng)
        logits = model(images).float()
        accuracy = targets.gather(1, logits.detach().argmax(1, keepdim=True)).mean()
        return {"loss": F.cross_entropy(logits, targets), "accuracy": accuracy}

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
        with autocast(recipe, device):
            outputs.append(model(normalise(batch, mean, std)).float())
    return torch.cat(outputs).cpu().numpy()
