"""CutMix, Mixup, Cutout and their feature-level kin: pure functions of given boxes, permutations, λ; one thin sampler.

CutMix paper (arXiv 1905.04899) section 3.1; the box formula from the published version (v1's pseudo-code forgot the
factors W and H). Labels are soft targets (N, C): cross-entropy with them equals λ·CE(a) + (1−λ)·CE(b).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backbench.common.base.errors import UserError
from backbench.common.base.recipe import Recipe, knob


@dataclass(frozen=True)
class Method:
    """One method of training a classifier: where it acts, and the function where it acts on each image.

    `kind`: none, image, label, pairs (mixes pairs of images; one of them per batch) or network (noise inside it:
    pretraining only). `image`: (normalised images (N, C, H, W), recipe, random stream) → images. `layers`: where a
    method that mixes features does so, as `mix_layers` counts, unless the recipe says.
    """

    kind: str
    image: Callable[[Tensor, "MixingRecipe", np.random.Generator], Tensor] | None = None
    layers: tuple[int, ...] = ()


def cutout_batch(images: Tensor, recipe: "MixingRecipe", rng: np.random.Generator) -> Tensor:
    """Cutout at a uniform centre per image."""
    height, width = images.shape[2:]
    centres = np.stack([rng.integers(width, size=len(images)), rng.integers(height, size=len(images))], 1)
    return cutout(images, _to(centres, images), round(recipe.cutout_share * width))


METHODS = {  # in the order in which a sum is written
    "baseline": Method("none"),
    "cutout": Method("image", cutout_batch),
    "mixup": Method("pairs"),
    "cutmix": Method("pairs"),
    "manifold_mixup": Method(
        "pairs", layers=(0, 2, 3)
    ),  # X: its authors' code draws among input, first and second stage
    "feature_cutmix": Method("pairs", layers=(0, 1, 2, 3, 4)),  # P: all that figure 3 shows
    "stochdepth": Method("network"),
    "dropblock": Method("network"),
    "label_smoothing": Method("label"),
    "shakedrop": Method("network"),
}
VARIANTS = (
    "standard",
    "fixed_size",
    "centre_gaussian",
    "scheduled",
    "one_hot",
    "complete_label",
)  # paper's table 8
STAGES = ("image", "bn1", "layer1", "layer2", "layer3")  # what `mix_layers` counts: the paper's 0 … 4
Box = tuple[int, int, int, int]  # x0, y0, x1, y1, half-open


def parse_method(text: str) -> tuple[str, ...]:
    """The names in `cutout+mixup`, in canonical order: two spellings of one sum are one method.

    Raises UserError for an unknown name, one given twice, baseline in a sum, or two that mix pairs.
    """
    names = text.split("+")
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"method {text!r}: no method {name!r}; use one of {', '.join(METHODS)}, or a sum like cutout+mixup"
            )
        if names.count(name) > 1:
            raise UserError(f"method {text!r}: {name} is given twice")
    if "baseline" in names and len(names) > 1:
        raise UserError(f"method {text!r}: baseline is nothing to add to; leave it out")
    pairs = [name for name in METHODS if name in names and METHODS[name].kind == "pairs"]
    if len(pairs) > 1:
        raise UserError(f"method {text!r}: {' and '.join(pairs)} both mix pairs, one batch takes one of them")
    return tuple(sorted(names, key=list(METHODS).index))


def for_any_classifier() -> list[str]:
    """The methods that every classifier's training can use: those that leave the network as it is."""
    return [name for name, method in METHODS.items() if method.kind != "network"]


def canonical_method(text: str) -> str:
    """`mixup+cutout` → `cutout+mixup`. Raises UserError as `parse_method`."""
    return "+".join(parse_method(text))


def pair_mixer(method: str) -> str | None:
    """The one part of a method that mixes pairs of images."""
    return next((name for name in parse_method(method) if METHODS[name].kind == "pairs"), None)


@dataclass(frozen=True, kw_only=True)
class MixingRecipe(Recipe):
    """How training images and labels are mixed."""

    network_methods = False  # whether its training has the methods inside the network; no field

    method: str = knob("baseline", f"a sum of {', '.join(for_any_classifier())}, e.g. cutout+mixup", "P")
    alpha: float = knob(1.0, "λ ~ Beta(alpha, alpha) of everything that mixes pairs", "P")
    probability: float = knob(
        1.0, "share of batches whose pairs are mixed: 1 for ImageNet and WSOL, .5 for CIFAR", "C, A"
    )
    per_sample: bool = knob(False, "λ, box and whether to mix for each image, not once a micro-batch", "C")
    correct_lam: bool = knob(True, "λ set to the exact share of pixels kept, after clipping the box", "P, C")
    cutmix_variant: str = knob(
        "standard",
        "the paper's table 8, of both CutMixes. fixed_size: half the sides, λ .75 before clipping. centre_gaussian: "
        "centre ~ N(side/2, side/4) (σ: I). scheduled: probability 0 → 1 over the training. one_hot: label of the "
        "larger part. complete_label: half and half",
        "P",
        choices=VARIANTS,
    )
    mix_layers: tuple[int, ...] = knob(
        (),
        "where feature_cutmix and manifold_mixup mix, one drawn a batch: 0 image, 1 conv1-bn1, 2 layer1, 3 layer2, "
        "4 layer3; none: the method's own, 0,1,2,3,4 (P) and 0,2,3 (X)",
        "P, X",
    )
    cutout_share: float = knob(0.5, "side of Cutout's square as a share of the image's", "P, X")
    label_smoothing: float = knob(
        0.1, "share of the label spread over all classes, with label_smoothing", "P"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", canonical_method(self.method))

    def check(self) -> None:
        """Refuse what cannot be mixed. Raises UserError naming the field."""
        super().check()
        names, pair = parse_method(self.method), pair_mixer(self.method)
        for name in names:
            if METHODS[name].kind == "network" and not self.network_methods:
                raise UserError(
                    f"recipe: method={self.method}: {name} is for pretraining only; "
                    f"here use {', '.join(for_any_classifier())}"
                )
        if not self.alpha > 0:
            raise UserError(f"recipe: alpha={self.alpha}, it must be above 0")
        if not 0 <= self.probability <= 1:
            raise UserError(f"recipe: probability={self.probability}, it must be from 0 to 1")
        if not 0 < self.cutout_share <= 1:
            raise UserError(
                f"recipe: cutout_share={self.cutout_share}, it must be in (0, 1]: a mask no larger than the image"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"recipe: label_smoothing={self.label_smoothing}, it must be in [0, 1)")
        if pair and (self.micro_batch or self.batch) < 2:
            raise UserError(f"recipe: {pair} mixes pairs, a micro-batch of 1 image has none")
        if self.cutmix_variant != "standard" and pair not in ("cutmix", "feature_cutmix"):
            raise UserError(
                f"recipe: cutmix_variant={self.cutmix_variant} is CutMix's, method={self.method} has none"
            )
        if self.mix_layers and not (pair and METHODS[pair].layers):
            layered = [name for name, method in METHODS.items() if method.layers]
            raise UserError(
                f"recipe: mix_layers belongs to {' and '.join(layered)}, not to method={self.method}"
            )
        if not set(self.mix_layers) <= set(range(len(STAGES))):
            raise UserError(
                f"recipe: mix_layers={','.join(map(str, self.mix_layers))}, choose among "
                f"{', '.join(f'{i} {name}' for i, name in enumerate(STAGES))}"
            )


def cutmix(images: Tensor, permutation: Tensor, box: Box | Tensor) -> Tensor:
    """Paste the box of images[permutation] into images. (N, C, H, W), a new tensor.

    `box` is one for all images, or a tensor (1 or N, 4) on their device: one for each.
    """
    if isinstance(box, Tensor):
        return torch.where(box_mask(box, images.shape[3], images.shape[2]), images[permutation], images)
    x0, y0, x1, y1 = box
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = images[permutation, :, y0:y1, x0:x1]
    return mixed


def mixup(images: Tensor, permutation: Tensor, lam: float | Tensor) -> Tensor:
    """λ·images + (1−λ)·images[permutation]; λ one number, or a tensor (1 or N,): one for each image."""
    if isinstance(lam, Tensor):  # not in bf16, which would round λ: the labels take it unrounded
        exact = torch.promote_types(images.dtype, torch.float32)
        lam = lam.to(exact).view(-1, 1, 1, 1)
        return torch.lerp(images[permutation].to(exact), images.to(exact), lam).to(images.dtype)
    return torch.lerp(images[permutation], images, lam)


def cutout(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Zero a square of `side` pixels around each image's centre (N, 2: x, y), clipped at the border.

    Run after normalisation, so that zero is the mean colour.
    """
    corner = centres - side // 2
    inside = box_mask(torch.cat([corner, corner + side], 1), images.shape[3], images.shape[2])
    return torch.where(inside, 0, images)  # masked_fill would lose channels-last


def mix_labels(targets: Tensor, permutation: Tensor, lam: float | Tensor) -> Tensor:
    """λ·targets + (1−λ)·targets[permutation] for soft targets (N, C); λ as in `mixup`."""
    if isinstance(lam, Tensor):
        lam = lam.to(targets.dtype).view(-1, 1)
    return lam * targets + (1 - lam) * targets[permutation]


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels (N,) → float32 (N, classes), without the look at their values that F.one_hot takes on the CPU."""
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels[:, None], 1)


def label_share(kept: float | Tensor, variant: str) -> float | Tensor:
    """The share of an image's own label where it kept the share `kept` of its pixels (paper, table 8).

    An even split counts as the image's own with one_hot (I); complete_label leaves an image alone that kept all (I).
    """
    if variant == "one_hot":
        return (kept >= 0.5) * 1.0
    if variant == "complete_label":
        return 1.0 - 0.5 * (kept < 1)
    return kept


def cutmix_box(width: int, height: int, lam: float, centre: tuple[int, int]) -> Box:
    """The box around `centre` with sides W·√(1−λ) and H·√(1−λ), truncated to integers and clipped [P, C]."""
    share = np.sqrt(1.0 - lam)
    half_w, half_h = int(width * share) // 2, int(height * share) // 2
    x, y = centre
    return max(x - half_w, 0), max(y - half_h, 0), min(x + half_w, width), min(y + half_h, height)


def cutmix_boxes(width: int, height: int, lam: Tensor, centres: Tensor) -> Tensor:
    """`cutmix_box` for λ (M,) float64 and pixels `centres` (M, 2: x, y): (M, 4) int64 on their device."""
    size = torch.stack([torch.full_like(lam, width), torch.full_like(lam, height)], 1)
    half = (size * torch.sqrt(1.0 - lam)[:, None]).long() // 2
    low, high = (centres - half).clamp(min=0), torch.minimum(centres + half, size.long())
    return torch.cat([low, high], 1)


def box_share(box: Box, width: int, height: int) -> float:
    """The part of the image inside the box."""
    return (box[2] - box[0]) * (box[3] - box[1]) / (width * height)


def box_mask(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes (M, 4) in pixels → (M, 1, H, W), true inside."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    columns = torch.arange(width, device=boxes.device)
    rows = torch.arange(height, device=boxes.device)
    in_columns, in_rows = (columns >= x0) & (columns < x1), (rows >= y0) & (rows < y1)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


@dataclass(frozen=True)
class Pairing:
    """One batch's draw, as tensors on the device: it mixes images or features of any size.

    M is 1 (one draw for the batch) or N (one for each image).
    """

    stage: str  # of STAGES
    permutation: Tensor  # (N,)
    lam: Tensor  # (M,) float64
    centres: Tensor | None  # (M, 2: x, y) float64, shares of the side, in [0, 1); None: interpolate, no box
    correct_lam: bool = True
    variant: str = "standard"

    def apply(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, C, H, W) → the mixed ones, and the share (M,) of its own label that each keeps."""
        if self.centres is None:
            return mixup(features, self.permutation, self.lam), self.lam
        height, width = features.shape[2:]
        side = torch.stack([torch.full_like(self.lam, width), torch.full_like(self.lam, height)], 1)
        boxes = cutmix_boxes(width, height, self.lam, (self.centres * side).long())
        kept = self.lam
        if self.correct_lam:
            kept = 1.0 - (boxes[:, 2:] - boxes[:, :2]).prod(1).double() / (width * height)
        return cutmix(features, self.permutation, boxes), label_share(kept, self.variant)


def mix(
    images: Tensor,
    labels: Tensor,
    classes: int,
    mixing: MixingRecipe,
    rng: np.random.Generator,
    progress: float | None = None,
) -> tuple[Tensor, Tensor, Pairing | None]:
    """Sample what `mixing` needs for a micro-batch and apply it: first what changes each image, then what mixes pairs.

    Normalised images (N, C, H, W) and integer labels (N,) → images, soft targets (N, classes), and the Pairing that
    is still to be applied to the features of its stage (`feature_mixing`), else None. The draws are made on the CPU,
    so that no step waits for the device. `progress` is the part of the training that is done, in [0, 1).
    """
    targets, pair = one_hot(labels, classes), pair_mixer(mixing.method)
    changes = [change for name in parse_method(mixing.method) if (change := METHODS[name].image)]
    if not changes and pair is None:
        return images, targets, None
    chance = rng.random(len(images) if mixing.per_sample and pair else None)
    mixed = chance < _probability(mixing, progress)
    height, width = images.shape[2:]
    for change in changes:
        images = change(images, mixing, rng)
    if pair is None or not np.any(mixed):
        return images, targets, None
    if mixing.per_sample or METHODS[pair].layers:
        pairing = _draw_pairing(pair, mixing, mixed, images, rng)
        if pairing.stage != "image":
            return images, targets, pairing
        images, kept = pairing.apply(images)
        return images, mix_labels(targets, pairing.permutation, kept), None
    lam = float(_draw_lam(mixing, rng))
    permutation = _to(rng.permutation(len(images)), images)
    if pair == "mixup":
        return mixup(images, permutation, lam), mix_labels(targets, permutation, lam), None
    box = cutmix_box(width, height, lam, _draw_centre(mixing, width, height, rng))
    if mixing.correct_lam:
        lam = 1.0 - box_share(box, width, height)
    share = label_share(lam, mixing.cutmix_variant)
    return cutmix(images, permutation, box), mix_labels(targets, permutation, share), None


def _probability(mixing: MixingRecipe, progress: float | None) -> float:
    if mixing.cutmix_variant != "scheduled":
        return mixing.probability
    if progress is None:
        raise ValueError('cutmix_variant=scheduled needs batch["progress"], the part of the training done')
    return progress


def _draw_lam(mixing: MixingRecipe, rng: np.random.Generator, size: int | None = None) -> np.ndarray | float:
    if mixing.cutmix_variant == "fixed_size":  # half the sides: 16² of 32²
        return np.full(size or (), 0.75)
    return rng.beta(mixing.alpha, mixing.alpha, size)


def _draw_centre(mixing: MixingRecipe, width: int, height: int, rng: np.random.Generator) -> tuple[int, int]:
    if mixing.cutmix_variant != "centre_gaussian":
        return int(rng.integers(width)), int(rng.integers(height))
    x, y = np.clip(rng.normal(0.5, 0.25, 2), 0, np.nextafter(1, 0))
    return int(x * width), int(y * height)


def _draw_pairing(
    pair: str, mixing: MixingRecipe, mixed: np.ndarray, images: Tensor, rng: np.random.Generator
) -> Pairing:
    count = len(images) if mixing.per_sample else 1
    lam = np.where(mixed, _draw_lam(mixing, rng, count), 1.0)
    permutation = rng.permutation(len(images))
    layers, centres = mixing.mix_layers or METHODS[pair].layers or (0,), None
    stage = STAGES[layers[rng.integers(len(layers))]]
    if "cutmix" in pair:
        gaussian = mixing.cutmix_variant == "centre_gaussian"
        centres = rng.normal(0.5, 0.25, (count, 2)) if gaussian else rng.random((count, 2))
        centres = _to(np.clip(centres, 0, np.nextafter(1, 0)), images)
    lam, permutation = _to(lam, images), _to(permutation, images)
    return Pairing(stage, permutation, lam, centres, mixing.correct_lam, mixing.cutmix_variant)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
