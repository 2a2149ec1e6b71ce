"""CutMix, Mixup and Cutout on batches: pure functions of given boxes, permutations and λ, and one thin sampler.

CutMix paper (arXiv 1905.04899) section 3.1; the box formula from the published version (v1's pseudo-code forgot the
factors W and H). Labels are soft targets (N, C): cross-entropy with them equals λ·CE(a) + (1−λ)·CE(b).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from common.recipe import Recipe, knob

METHODS = ("baseline", "mixup", "cutout", "cutmix")
Box = tuple[int, int, int, int]  # x0, y0, x1, y1, half-open


@dataclass(frozen=True, kw_only=True)
class MixingRecipe(Recipe):
    """How training images and labels are mixed."""

    method: str = knob("baseline", "how batches are mixed", "P", choices=METHODS)
    alpha: float = knob(1.0, "λ ~ Beta(alpha, alpha) of Mixup and CutMix", "P")
    probability: float = knob(
        1.0, "share of batches that are mixed: 1 for ImageNet and WSOL, .5 for CIFAR", "C, A"
    )
    correct_lam: bool = knob(True, "λ set to the exact share of pixels kept, after clipping the box", "P, C")
    cutout_share: float = knob(0.5, "side of Cutout's square as a share of the image's", "P, X")

    def check(self) -> None:
        """Refuse what cannot be mixed. Raises UserError naming the field."""
        super().check()
        if not self.alpha > 0:
            raise UserError(f"recipe: alpha={self.alpha}, it must be above 0")
        if not 0 < self.cutout_share <= 1:
            raise UserError(
                f"recipe: cutout_share={self.cutout_share}, it must be in (0, 1]: a mask no larger than the image"
            )
        if self.method != "baseline" and (self.micro_batch or self.batch) < 2 and self.method != "cutout":
            raise UserError(f"recipe: {self.method} mixes pairs, a micro-batch of 1 image has none")


def cutmix(images: Tensor, permutation: Tensor, box: Box) -> Tensor:
    """Paste the box of images[permutation] into images. (N, C, H, W), a new tensor."""
    x0, y0, x1, y1 = box
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = images[permutation, :, y0:y1, x0:x1]
    return mixed


def mixup(images: Tensor, permutation: Tensor, lam: float) -> Tensor:
    """λ·images + (1−λ)·images[permutation]."""
    return torch.lerp(images[permutation], images, lam)


def cutout(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Zero a square of `side` pixels around each image's centre (N, 2: x, y), clipped at the border.

    Run after normalisation, so that zero is the mean colour.
    """
    height, width = images.shape[2:]
    left, top = (centres - side // 2).unbind(1)
    columns = torch.arange(width, device=images.device)
    rows = torch.arange(height, device=images.device)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + side)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + side)
    return images.masked_fill((in_rows[:, None, :, None] & in_columns[:, None, None, :]), 0)


def mix_labels(targets: Tensor, permutation: Tensor, lam: float) -> Tensor:
    """λ·targets + (1−λ)·targets[permutation] for soft targets (N, C)."""
    return lam * targets + (1 - lam) * targets[permutation]


def cutmix_box(width: int, height: int, lam: float, centre: tuple[int, int]) -> Box:
    """The box around `centre` with sides W·√(1−λ) and H·√(1−λ), truncated to integers and clipped [P, C]."""
    share = np.sqrt(1.0 - lam)
    half_w, half_h = int(width * share) // 2, int(height * share) // 2
    x, y = centre
    return max(x - half_w, 0), max(y - half_h, 0), min(x + half_w, width), min(y + half_h, height)


def box_share(box: Box, width: int, height: int) -> float:
    """The part of the image inside the box."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (width * height)


def mix(
    images: Tensor, labels: Tensor, classes: int, mixing: MixingRecipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Sample one λ, box and permutation for the batch and apply `mixing`.

    Normalised images (N, C, H, W) and integer labels (N,) → mixed images and soft targets (N, classes). The draws are
    made on the CPU, so that no step waits for the device.
    """
    targets = F.one_hot(labels, classes).float()
    if mixing.method == "baseline" or rng.random() >= mixing.probability:
        return images, targets
    height, width = images.shape[2:]
    if mixing.method == "cutout":
        centres = np.stack([rng.integers(width, size=len(images)), rng.integers(height, size=len(images))], 1)
        return cutout(images, _to(centres, images), round(mixing.cutout_share * width)), targets
    lam = float(rng.beta(mixing.alpha, mixing.alpha))
    permutation = _to(rng.permutation(len(images)), images)
    if mixing.method == "mixup":
        return mixup(images, permutation, lam), mix_labels(targets, permutation, lam)
    box = cutmix_box(width, height, lam, (int(rng.integers(width)), int(rng.integers(height))))
    if mixing.correct_lam:
        lam = 1.0 - box_share(box, width, height)
    return cutmix(images, permutation, box), mix_labels(targets, permutation, lam)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
