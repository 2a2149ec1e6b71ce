"""Training crops and test crops of a classifier's images: from files, from a decoded cache, or on the device."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import Recipe, knob
from backbench.common.data.colour import colour_jitter, lighting
from backbench.common.data.decode import BACKENDS, Fit, decode_all, resize
from backbench.common.data.short_sides import short_sides
from backbench.common.data.types import ImageSet

SQUARES = (
    8 << 30
)  # bytes of decoded squares that `cache=auto` puts on the disk at most: 40,000 images at 256²
Box = tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True, kw_only=True)
class CropRecipe(Recipe):
    """How images become the network's input."""

    size: int = knob(224, "side of the network's input in pixels", "P")
    resize: int = knob(
        256,
        "side to which images are resized: the short side before the test's centre crop and in the short cache, both "
        "sides before a shift, pad or none crop",
        "C",
    )
    crop: str = knob(
        "random_resized",
        "training crop: random_resized (area .08–1, ratio 3/4–4/3) of the whole image; of the image squeezed to "
        "resize²: shift (a size² window), pad (the same after `pad` black pixels were put around), none (the centre)",
        "P",
        choices=("random_resized", "shift", "pad", "none"),
    )
    pad: int = knob(4, "black pixels around the image for crop=pad", "C")
    resize_backend: str = knob(
        "pil",
        "pil: antialiased bilinear, PIL's pixels; torch: the same within 2 of 255, twice as fast; cv2_area: area when "
        "shrinking, else bilinear; cv2_linear: bilinear without antialiasing",
        "P",
        choices=BACKENDS,
    )
    cache: str = knob(
        "auto",
        "where training pixels come from: file; short (random_resized): images decoded once, the short side shrunk to "
        "resize by PIL; square (the other crops): squeezed to resize² once; auto: file for random_resized, square for "
        "the others up to 8 GiB",
        "I",
        choices=("auto", "file", "short", "square"),
    )
    resident: bool = knob(
        False,
        "keep the decoded squares on the device and crop there: the same pixels; for shift, pad and none",
        "I",
        stage="",
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
        if not 1 <= self.size <= self.resize:
            raise UserError(
                f"recipe: size={self.size} and resize={self.resize}, nothing could be cropped; 1 ≤ size ≤ resize"
            )
        if self.pad < 0:
            raise UserError(f"recipe: pad={self.pad}, it must be 0 or more")
        whole = self.crop == "random_resized"
        if self.cache == ("square" if whole else "short"):
            possible = "auto, file or short" if whole else "auto, file or square"
            raise UserError(f"recipe: cache={self.cache} with crop={self.crop}; choose {possible}")
        if self.resident and (whole or self.cache == "file" or self.colour != "none"):
            raise UserError(
                "recipe: resident=true needs crop=shift, pad or none, cache=auto or square, and colour=none"
            )


class TrainImages:
    """Training images as uint8 crops with labels; see `CropRecipe`."""

    def __init__(self, images: ImageSet, recipe: CropRecipe) -> None:
        self.images, self.recipe = images, recipe
        self.squares = _squares(images, recipe)
        short = recipe.cache == "short" and images.pixels is None
        self.shorts = short_sides(images.paths, recipe.resize) if short else None
        self.workers = 0 if self.squares is not None and recipe.colour == "none" else _cores()
        self.held: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int], rngs: list[np.random.Generator]) -> dict[str, Any]:
        """ "images" uint8 (N, size, size, 3), "labels" int64 (N,), "ids".

        With `resident`, instead of "images": "index" int64 (N,), "corner" int64 (N, 2: x, y) and "flip" bool (N,).
        """
        batch = {
            "labels": torch.from_numpy(self.images.labels[indices]),
            "ids": [str(self.images.ids[index]) for index in indices],
        }
        if self.recipe.resident:
            draws = [(self._corner(rng), rng.random() < 0.5) for rng in rngs]
            batch["index"] = torch.tensor(indices, dtype=torch.int64)
            batch["corner"] = torch.from_numpy(np.array([corner for corner, _ in draws], np.int64))
            batch["flip"] = torch.tensor([flip for _, flip in draws])
            return batch
        size = self.recipe.size
        crops = np.empty((len(indices), size, size, 3), np.uint8)
        for row, index, rng in zip(crops, indices, rngs):
            self._crop_into(row, index, rng)
        return {"images": torch.from_numpy(crops), **batch}

    def on_device(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """With `resident`: the batch, already on `device`, with "images" gathered there; otherwise the batch itself.

        The first call puts the set on the device. Raises UserError when it does not fit.
        """
        if "corner" not in batch:
            return batch
        if self.held is None or self.held.device != batch["corner"].device:
            self.held = self._hold(device)
        batch = dict(batch)
        index, corner, flip = (batch.pop(name) for name in ("index", "corner", "flip"))
        along = torch.arange(self.recipe.size, device=corner.device)
        columns = corner[:, :1] + torch.where(flip[:, None], along.flip(0), along)
        rows = corner[:, 1:] + along
        return {"images": self.held[index[:, None, None], rows[:, :, None], columns[:, None, :]], **batch}

    def _hold(self, device: torch.device) -> Tensor:
        pad = self.recipe.pad if self.recipe.crop == "pad" else 0
        try:
            held = torch.from_numpy(np.array(self.squares)).to(device)
            return F.pad(held, (0, 0, pad, pad, pad, pad)) if pad else held
        except torch.OutOfMemoryError:
            raise UserError(
                f"recipe: resident=true, but {self.squares.nbytes / 1e9:.1f} GB of images do not fit on {device}; "
                "--set resident=false"
            ) from None

    def _crop_into(self, row: np.ndarray, index: int, rng: np.random.Generator) -> None:
        recipe = self.recipe
        if recipe.crop == "random_resized":
            image = self.images.read(index) if self.shorts is None else self.shorts[index]
            crop = random_resized_crop(image, recipe.size, rng, backend=recipe.resize_backend)
        else:
            pad = recipe.pad if recipe.crop == "pad" else 0
            x, y = self._corner(rng) - pad
            crop = window(self._square(index), int(x), int(y), recipe.size)
        if recipe.colour == "code":
            crop = lighting(colour_jitter(crop, rng), rng)
        if rng.random() < 0.5:
            import cv2

            cv2.flip(crop, 1, dst=row)  # seven times as fast as a reversed view
        else:
            row[:] = crop

    def _square(self, index: int) -> np.ndarray:
        side = self.recipe.resize
        if self.squares is not None:
            return self.squares[index]
        return resize(self.images.read(index), (side, side), self.recipe.resize_backend)

    def _corner(self, rng: np.random.Generator) -> np.ndarray:
        """int64 (2,): x and y of the crop in the square with its border."""
        recipe = self.recipe
        if recipe.crop == "none":
            return np.full(2, round((recipe.resize - recipe.size) / 2))
        border = 2 * recipe.pad if recipe.crop == "pad" else 0
        return rng.integers(recipe.resize + border - recipe.size + 1, size=2)


def _squares(images: ImageSet, recipe: CropRecipe) -> np.ndarray | None:
    """uint8 (n, resize, resize, 3) where they are to be decoded once, else None."""
    side = recipe.resize
    if recipe.crop == "random_resized" or recipe.cache == "file":
        return None
    if images.pixels is not None:
        return _fitted(images.pixels, Fit(side, side, backend=recipe.resize_backend))
    if recipe.cache == "auto" and not recipe.resident and len(images) * side * side * 3 > SQUARES:
        return None
    return np.asarray(decode_all(images.paths, Fit(side, side, backend=recipe.resize_backend)))


def _fitted(pixels: np.ndarray, fit: Fit) -> np.ndarray:
    """`fit` of every image of a set that comes as an array."""
    if pixels.shape[1:3] == (fit.height, fit.width) and fit.short in (None, fit.width):
        return pixels
    return np.stack([fit(image) for image in pixels])


def _cores() -> int:
    """Loader processes: one a core of this process's share of the machine, 2 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 2), 16)


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """x, y, width, height of torchvision's RandomResizedCrop in an image of that size."""
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    # as torchvision: the central part of the nearest allowed ratio
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(
    image: np.ndarray, size: int, rng: np.random.Generator, backend: str = "pil"
) -> np.ndarray:
    """uint8 (H, W, 3) → (size, size, 3): cropped first, then resized; with `pil` torchvision's RandomResizedCrop."""
    x, y, w, h = crop_box(image.shape[1], image.shape[0], rng)
    return resize(image[y : y + h, x : x + w], (size, size), backend)


def window(image: np.ndarray, x: int, y: int, size: int) -> np.ndarray:
    """The size² window of an image (H, W, 3) whose corner is (x, y); black where it reaches outside."""
    inside = image[max(y, 0) : max(y + size, 0), max(x, 0) : max(x + size, 0)]
    if inside.shape[:2] == (size, size):
        return inside
    black = np.zeros((size, size, 3), np.uint8)
    top, left = max(-y, 0), max(-x, 0)
    black[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return black


def test_images(images: ImageSet, recipe: CropRecipe) -> np.ndarray:
    """uint8 (n, size, size, 3): the short side at `resize`, the centre kept; decoded once."""
    fit = Fit(recipe.size, recipe.size, short=recipe.resize, backend=recipe.resize_backend)
    return decode_all(images.paths, fit) if images.pixels is None else _fitted(images.pixels, fit)
