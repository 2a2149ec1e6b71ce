"""Training crops and test crops of a classifier's images: from files or from what was decoded before."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from common.data.colour import colour_jitter, lighting
from common.data.decode import Fit, decode_all
from common.data.types import ImageSet
from common.errors import UserError
from common.recipe import Recipe, knob


@dataclass(frozen=True, kw_only=True)
class CropRecipe(Recipe):
    """How images become the network's input."""

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

    def check(self) -> None:
        """Refuse what cannot be cropped. Raises UserError naming the field."""
        super().check()
        if self.size > self.resize:
            raise UserError(
                f"recipe: size={self.size} is larger than resize={self.resize}, nothing could be cropped"
            )


class TrainImages:
    """Training images as uint8 crops with labels; see `CropRecipe.crop`."""

    def __init__(self, images: ImageSet, recipe: CropRecipe) -> None:
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
            crop = random_resized_crop(self.images.read(index), size, rng)
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


def test_images(images: ImageSet, recipe: CropRecipe) -> np.ndarray:
    """uint8 (n, size, size, 3): the short side at `resize`, the centre kept; decoded once."""
    return decode_all(images.paths, Fit(recipe.size, recipe.size, short=recipe.resize))
