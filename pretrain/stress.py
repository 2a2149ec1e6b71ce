"""Four tests of a trained classifier (paper, section 4.4 and appendix E): images → what it answers to each.

Pixels are float (N, 3, H, W) in [0, 1]; the normalisation is part of the classifier, so that a gradient and a step are
in pixels. Predictions stay on the device until a test's end.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbench.common.base.errors import UserError
from backbench.common.base.progress import progress
from backbench.common.engine import SPLIT, autocast, stream
from backbench.pretrain.recipes import RobustnessRecipe

Classifier = Callable[[Tensor], Tensor]  # pixels → logits float32 (N, C)


def classifier(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    recipe: RobustnessRecipe,
    device: torch.device,
) -> Classifier:
    """`model` in eval mode on `device`, its weights without gradients, as a function of pixels."""
    model.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))

    def logits(pixels: Tensor) -> Tensor:
        with autocast(recipe.precision, device):
            return model((pixels - mean) / std).float()

    return logits


def fgsm(
    classify: Classifier, pixels: Tensor, labels: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(attacked pixels, clean logits, largest |gradient| of each image): x + ε · sign(∇ₓ CE(x, y)), cut to [0, 1].

    Goodfellow et al. (2015). An image whose gradient is 0 throughout, as of a saturated softmax, is not attacked.
    """
    pixels = pixels.detach().requires_grad_()
    with torch.enable_grad():
        logits = classify(pixels)
        loss = F.cross_entropy(logits, labels, reduction="sum")  # a mean would shrink gradients
    (gradient,) = torch.autograd.grad(loss, pixels)
    attacked = (pixels.detach() + epsilon * gradient.sign()).clamp_(0, 1)
    return attacked, logits.detach(), gradient.abs().amax((1, 2, 3))


def hole_sides(size: int, steps: int) -> list[int]:
    """Sides of the central hole, in `steps` steps from 0 to `size` pixels."""
    return [round(size * k / steps) for k in range(steps + 1)]


def central_hole(size: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """bool (size, size): True within the central `side` × `side` pixels."""
    mask = torch.zeros(size, size, dtype=torch.bool, device=device)
    start = (size - side) // 2
    mask[start : start + side, start : start + side] = True
    return mask


def run_fgsm(
    classify: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    recipe: RobustnessRecipe,
    device: torch.device,
    desc: str,
) -> dict[str, np.ndarray]:
    """Classes predicted before and after the attack, `clean` and `attacked`, int (n,); `blind` (n,): gradient 0.

    images uint8 (n, S, S, 3); labels int (n,), indices of the network's classes.
    """
    clean, attacked, blind = [], [], []
    truth = torch.from_numpy(labels).to(device)
    for part in batches(len(images), recipe.test_batch, desc):
        pixels = to_pixels(images[part], device)
        moved, logits, steepest = fgsm(classify, pixels, truth[part], recipe.epsilon / 255)
        clean.append(best(logits))
        blind.append(steepest == 0)
        with torch.inference_mode():
            attacked.append(best(classify(moved)))
    return {"clean": gathered(clean), "attacked": gathered(attacked), "blind": gathered(blind)}


@torch.inference_mode()
def run_clean(
    classify: Classifier, images: np.ndarray, recipe: RobustnessRecipe, device: torch.device, desc: str
) -> np.ndarray:
    """Classes predicted for images uint8 (n, S, S, 3) as they are, int (n,)."""
    parts = batches(len(images), recipe.test_batch, desc)
    return gathered([best(classify(to_pixels(images[part], device))) for part in parts])


@torch.inference_mode()
def run_occlusion(
    classify: Classifier,
    images: np.ndarray,
    mean: Sequence[float],
    recipe: RobustnessRecipe,
    device: torch.device,
    desc: str,
) -> dict[str, np.ndarray]:
    """Classes predicted with the hole hidden, `centre`, and with all around it hidden, `boundary`, int (n, k).

    k is the number of `hole_sides`. A hidden pixel is the recipe's `fill`.
    """
    size = images.shape[1]
    masks = [central_hole(size, side, device) for side in hole_sides(size, recipe.holes)]
    fill = torch.tensor(mean if recipe.fill == "mean" else (0.0,) * 3, device=device).view(1, 3, 1, 1)
    centre, boundary = [], []
    for part in batches(len(images), recipe.test_batch, desc):
        pixels = to_pixels(images[part], device)
        hidden = [best(classify(torch.where(mask, fill, pixels))) for mask in masks]
        around = [best(classify(torch.where(mask, pixels, fill))) for mask in masks[1:-1]]
        centre.append(torch.stack(hidden, 1))
        boundary.append(torch.stack([hidden[-1], *around, hidden[0]], 1))  # nothing and everything shown
    return {"centre": gathered(centre), "boundary": gathered(boundary)}


def draw_pairs(images: int, pairs: int, seed: int) -> np.ndarray:
    """int64 (pairs, 2): two different images each; every image is as often the first and as often the second, ±1.

    Round after round, all images in a new random order, each with its next.
    """
    rng = stream(SPLIT, seed, 1)
    rounds = []
    for _ in range(-(-pairs // images)):
        order = rng.permutation(images)
        rounds.append(np.stack([order, np.roll(order, -1)], 1))
    return np.concatenate(rounds)[:pairs]


@torch.inference_mode()
def run_between(
    classify: Classifier,
    images: np.ndarray,
    pairs: np.ndarray,
    recipe: RobustnessRecipe,
    device: torch.device,
    desc: str,
) -> dict[str, np.ndarray]:
    """Classes predicted for mixed pairs: `mixup` (p, l + 1), λ from 1 to 0; `cutmix` (p, k): the hole from 0 on.

    Mixup: λ · first + (1 − λ) · second. CutMix: the first with a central hole that shows the second.
    """
    size = images.shape[1]
    masks = [central_hole(size, side, device) for side in hole_sides(size, recipe.holes)]
    weights = [k / recipe.lambdas for k in range(recipe.lambdas + 1)]
    mixup, cutmix = [], []
    for part in batches(len(pairs), recipe.test_batch, desc, "pair"):
        first, second = (to_pixels(images[pairs[part, k]], device) for k in (0, 1))
        mixed = [best(classify(torch.lerp(first, second, weight))) for weight in weights]
        pasted = [best(classify(torch.where(mask, second, first))) for mask in masks[1:-1]]
        mixup.append(torch.stack(mixed, 1))
        cutmix.append(torch.stack([mixed[0], *pasted, mixed[-1]], 1))  # the whole first, the whole second
    return {"mixup": gathered(mixup), "cutmix": gathered(cutmix)}


@torch.inference_mode()
def run_confidence(
    classify: Classifier,
    count: int,
    read: Callable[[slice], np.ndarray],
    recipe: RobustnessRecipe,
    device: torch.device,
    desc: str,
) -> np.ndarray:
    """Log of the largest softmax probability (temperature 1) of `count` images, float64 (count,).

    `read` gives a part of them: uint8, or float32 in [0, 1], (N, S, S, 3).
    """
    found = [
        log_confidence(classify(to_pixels(read(part), device)))
        for part in batches(count, recipe.test_batch, desc)
    ]
    return gathered(found)


def log_confidence(logits: Tensor) -> Tensor:
    """Log of the largest softmax probability, float64 (N,), of logits (N, C); NaN where one is not finite.

    In float32 the probability itself is 1.0 for many confident images, which would tie.
    """
    ahead, best = logits.double().max(1, keepdim=True)
    others = (logits.double() - ahead).exp().scatter(1, best, 0)
    return torch.where(logits.isfinite().all(1), -torch.log1p(others.sum(1)), torch.nan)


def noise(kind: str, start: int, count: int, size: int, seed: int) -> np.ndarray:
    """Images `start` … of a kind of noise, float32 (count, size, size, 3) in [0, 1], each of its own random stream.

    uniform: U(0, 1); gaussian: N(½, 1) cut to [0, 1] (Liang et al. 2018).
    """
    made = np.empty((count, size, size, 3), np.float32)
    for row, index in zip(made, range(start, start + count)):
        rng = stream(SPLIT, seed, 2, ("uniform", "gaussian").index(kind), index)
        if kind == "uniform":
            rng.random(out=row, dtype=np.float32)
        else:
            rng.standard_normal(out=row, dtype=np.float32)
    return made if kind == "uniform" else np.clip(made + 0.5, 0, 1, out=made)


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3), or float in [0, 1], → float32 (N, 3, H, W) in [0, 1] on `device`."""
    moved = torch.from_numpy(np.array(images)).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return moved if moved.is_floating_point() else moved.float() / 255


def batches(count: int, size: int, desc: str, unit: str = "img") -> Iterator[slice]:
    """Slices of `count` things, `size` at a time, under a progress bar that counts things."""
    with progress(desc=desc, total=count, unit=unit, delay=2) as bar:
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield part
            bar.update(part.stop - part.start)


def best(logits: Tensor) -> Tensor:
    """The class of the highest logit, int64 (N,); −1 where one is not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def gathered(parts: list[Tensor]) -> np.ndarray:
    """The batches' answers as one array, classes as int32. Raises UserError where logits were not finite."""
    whole = torch.cat(parts).cpu().numpy()
    bad = int(
        (np.isnan(whole) if whole.dtype == np.float64 else whole < 0).reshape(len(whole), -1).any(1).sum()
    )
    if bad:
        raise UserError(
            f"logits are not finite for {bad} of {len(whole)} images: the weights are broken, or too large for this "
            "arithmetic (--set precision=fp32)"
        )
    return whole.astype(np.int32) if whole.dtype == np.int64 else whole
