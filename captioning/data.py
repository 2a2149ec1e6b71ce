"""What NIC trains on: pooled features of a frozen encoder, computed once, or images; and the captions' words."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from backbench.captioning.recipes import CaptionRecipe
from backbench.captioning.vocabulary import PAD, Vocabulary
from backbench.common.backbones.load import Backbone
from backbench.common.backbones.resnet import normalise
from backbench.common.base.cache import cached_array, files_state
from backbench.common.base.files import digest
from backbench.common.base.progress import progress
from backbench.common.data.decode import Fit, centre_crop, decode_all, read_rgb
from backbench.common.data.types import CaptionSet
from backbench.common.engine import autocast, stream

VIEW = 100  # use number of the streams that place the views' crops: the same for every seed and backbone
BLOCK = 64  # images an encoder pass: no recipe field, as it can move the last bit of a feature
GROUP = 20  # captions at least that the LSTM reads together; where it reads a whole batch, half is padding
IN_MEMORY = 2 << 30  # bytes of decoded images that are kept in the cache folder; more are decoded when needed


def pooled_features(
    backbone: Backbone,
    paths: Sequence[Path],
    recipe: CaptionRecipe,
    device: torch.device,
    views: int,
    precision: str,
) -> np.ndarray:
    """The frozen encoder's pooled layer4 features of `views` crops an image: float32 (n, views, D), memory-mapped.

    Kept in the cache folder under the weights, the images' files, the transform and the arithmetic.
    """
    what = [backbone.fingerprint, backbone.arch, backbone.mean, backbone.std, files_state(paths), precision]
    key = digest("features 1", *what, device.type, recipe.resize, recipe.size, views, PIL.__version__)
    args = backbone, paths, recipe, device, views, precision
    return cached_array("features", key, lambda file: np.save(file, _compute(*args)))


@torch.no_grad()  # not inference mode: the trunk may be trained later
def _compute(
    backbone: Backbone,
    paths: Sequence[Path],
    recipe: CaptionRecipe,
    device: torch.device,
    views: int,
    precision: str,
) -> np.ndarray:
    trunk = backbone.trunk.to(device, memory_format=torch.channels_last).eval()
    found = []
    for first, images in _decoded_blocks(paths, Fit(recipe.resize, recipe.resize), BLOCK):
        crops = np.stack(
            [crop for k, image in enumerate(images) for crop in _views(image, first + k, recipe, views)]
        )
        for start in range(0, len(crops), BLOCK):
            batch = torch.from_numpy(crops[start : start + BLOCK]).to(device)
            with autocast(precision, device):
                found.append(trunk(normalise(batch, backbone.mean, backbone.std)).float().mean((2, 3)).cpu())
    return torch.cat(found).numpy().reshape(len(paths), views, -1)


def _decoded_blocks(paths: Sequence[Path], fit: Fit, block: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        progress(desc="encoding images", total=len(paths), unit="img") as bar,
    ):
        for start in range(0, len(paths), block):
            part = paths[start : start + block]
            yield start, list(pool.map(lambda path: fit(read_rgb(path)), part))
            bar.update(len(part))


def _views(image: np.ndarray, index: int, recipe: CaptionRecipe, views: int) -> list[np.ndarray]:
    """The stated crops of an image: centre, mirrored centre, then random crops, every other one mirrored."""
    size, slack = recipe.size, recipe.resize - recipe.size
    crops = [centre_crop(image, (size, size))]
    for view in range(1, views):
        crop = crops[0]
        if view > 1:
            x, y = stream(VIEW, view, index).integers(slack + 1, size=2)
            crop = image[y : y + size, x : x + size]
        crops.append(crop[:, ::-1] if view % 2 else crop)
    return crops


class CaptionItems:
    """Training items: images, as features or pixels, with their captions' words. See `CaptionRecipe.group`."""

    def __init__(
        self,
        images: CaptionSet,
        words: Sequence[Sequence[Sequence[str]]],
        vocabulary: Vocabulary,
        recipe: CaptionRecipe,
        *,
        features: np.ndarray | None = None,
        crop: tuple[int, int] = (0, 0),
    ) -> None:
        """`words` are the captions of `images` as words. Without `features` (n, views, D) images are read.

        `crop` is (resize, size) of random crops, half of them mirrored.
        """
        self.images, self.features, self.crop = images, features, crop
        encoded = [[vocabulary.encode(w, recipe.train_longest) for w in captions] for captions in words]
        self.items = [(i, captions) for i, captions in enumerate(encoded)]
        if not recipe.group:
            self.items = [(i, [caption]) for i, captions in self.items for caption in captions]
        small = features is None and len(images) * crop[0] ** 2 * 3 <= IN_MEMORY
        self.decoded = decode_all(images.paths, Fit(crop[0], crop[0])) if small else None
        self.workers = 2 if features is None and not small else 0

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: list[int], rngs: list[np.random.Generator]) -> dict[str, Any]:
        """ "inputs" float32 (N, D) features or uint8 (N, size, size, 3), "captions" int64 (N, c, L), "ids".

        And "groups", the captions by length, as `NIC.forward` takes them.
        """
        chosen = [self.items[index] for index in indices]
        inputs = np.stack([self._input(image, rng) for (image, _), rng in zip(chosen, rngs)])
        longest = max(len(caption) for _, captions in chosen for caption in captions)
        most = max(len(captions) for _, captions in chosen)
        padded = np.full((len(chosen), most, longest), PAD, np.int64)
        for row, (_, captions) in zip(padded, chosen):
            for line, caption in zip(row, captions):
                line[: len(caption)] = caption
        return {
            "inputs": torch.from_numpy(inputs),
            "captions": torch.from_numpy(padded),
            "groups": _groups((padded != PAD).sum(2).reshape(-1)),
            "ids": [str(self.images.ids[image]) for image, _ in chosen],
        }

    def _input(self, image: int, rng: np.random.Generator) -> np.ndarray:
        if self.features is not None:
            return self.features[image, rng.integers(self.features.shape[1])]
        resize, size = self.crop
        if self.decoded is not None:
            pixels = self.decoded[image]
        else:
            pixels = Fit(resize, resize)(read_rgb(self.images.paths[image]))
        x, y = rng.integers(resize - size + 1, size=2)
        pixels = pixels[y : y + size, x : x + size]
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _groups(lengths: np.ndarray) -> list[tuple[torch.Tensor, int]]:
    """Numbers of captions of similar length, GROUP of them or more, and the longest one's length."""
    order = np.argsort(lengths, kind="stable")[(lengths == 0).sum() :]  # without those that only fill up
    starts = [0]
    for i in np.flatnonzero(np.diff(lengths[order])) + 1:
        if i - starts[-1] >= GROUP:
            starts.append(i)
    return [(torch.from_numpy(rows), int(lengths[rows[-1]])) for rows in np.split(order, starts[1:])]


def centre_crops(paths: Sequence[Path], crop: tuple[int, int], block: int) -> Iterator[np.ndarray]:
    """Centre crops of test images, uint8 (block, size, size, 3) at a time. `crop` is (resize, size)."""
    resize, size = crop
    for _, images in _decoded_blocks(paths, Fit(resize, resize), block):
        yield np.stack([centre_crop(image, (size, size)) for image in images])
