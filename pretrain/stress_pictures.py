"""What the tests show to a classifier, as one picture a test."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from backbench.pretrain.outliers import Outliers
from backbench.pretrain.recipes import RobustnessRecipe
from backbench.pretrain.stress import Classifier, central_hole, fgsm, hole_sides, to_pixels

ACROSS = 8


def fgsm_examples(
    classify: Classifier, images: np.ndarray, labels: np.ndarray, epsilon: float, device: torch.device
) -> np.ndarray:
    """Rows: images from all over the set, attacked, and what was added (grey: nothing, black and white: ε)."""
    some = spread(len(images))
    pixels = to_pixels(images[some], device)
    attacked = fgsm(classify, pixels, torch.from_numpy(labels[some]).to(device), epsilon / 255)[0]
    added = (attacked - pixels) * 255 / (2 * epsilon or 1) + 0.5
    return sheet([pixels, attacked, added])


def occlusion_examples(
    images: np.ndarray, mean: Sequence[float], recipe: RobustnessRecipe, device: torch.device
) -> np.ndarray:
    """Rows: the centre of the first image hidden, all around it hidden, by growing holes."""
    pixels = to_pixels(images[:1], device)[0]
    fill = torch.tensor(mean if recipe.fill == "mean" else (0.0,) * 3, device=device).view(3, 1, 1)
    masks = _masks(recipe, device)
    return sheet(
        [[torch.where(m, fill, pixels) for m in masks], [torch.where(m, pixels, fill) for m in masks]]
    )


def between_examples(
    images: np.ndarray, pairs: np.ndarray, recipe: RobustnessRecipe, device: torch.device
) -> np.ndarray:
    """Rows: the first pair mixed by growing shares of its second image, and by growing holes that show it."""
    first, second = to_pixels(images[pairs[0]], device)
    mixed = [torch.lerp(first, second, weight) for weight in np.linspace(0, 1, ACROSS).tolist()]
    return sheet([mixed, [torch.where(mask, second, first) for mask in _masks(recipe, device)]])


def ood_examples(
    images: np.ndarray, outliers: Sequence[Outliers], readers: Sequence[Callable], device: torch.device
) -> np.ndarray:
    """Rows: test images from all over the set, then the first of each other set."""
    rows = [
        images[spread(len(images))],
        *(read(slice(0, min(ACROSS, o.count))) for o, read in zip(outliers, readers)),
    ]
    return sheet([to_pixels(row, device) for row in rows])


def _masks(recipe: RobustnessRecipe, device: torch.device) -> list[Tensor]:
    """At most `ACROSS` holes from none to the whole image."""
    sides = hole_sides(recipe.size, recipe.holes)
    return [central_hole(recipe.size, sides[k], device) for k in spread(len(sides))]


def spread(count: int) -> list[int]:
    """At most `ACROSS` indices, evenly from the first to the last of `count`."""
    return list(dict.fromkeys(np.linspace(0, count - 1, min(ACROSS, count)).round().astype(int).tolist()))


def sheet(rows: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Pixels (3, S, S) in [0, 1], in rows, as one picture uint8 (H, W, 3) on white."""
    side, gap = rows[0][0].shape[-1], 4
    across = max(map(len, rows))
    picture = np.full((len(rows) * (side + gap) + gap, across * (side + gap) + gap, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            top, left = gap + y * (side + gap), gap + x * (side + gap)
            tile = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            picture[top : top + side, left : left + side] = tile
    return picture
