"""Batches of images with boxes: training views for both detectors, and images in order for prediction."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbench.common.base.errors import UserError
from backbench.common.base.progress import progress
from backbench.common.data.decode import read_rgb
from backbench.common.data.types import DetectionSet
from backbench.detection.augment import frcnn_view, ssd_view
from backbench.detection.recipes import DetectionRecipe, FasterRCNNRecipe, SSDRecipe
from backbench.detection.scores import truth_of

IN_MEMORY = 2**30  # bytes of decoded images that are kept
READERS = 4  # threads that decode
MOST_WORKERS = 16  # loader processes beside a GPU


def class_notes(train_set: DetectionSet, test_set: DetectionSet) -> list[str]:
    """Lines on classes of which only one of the two sets has objects, as a misspelt name has."""
    trained = np.bincount(np.concatenate(train_set.labels), minlength=len(train_set.classes)) > 0
    truth = truth_of(test_set)
    tested = np.bincount(truth.label[~truth.difficult], minlength=len(test_set.classes)) > 0
    rules = {
        "without a training object: its AP can only be 0": tested & ~trained,
        "without a test object that counts: left out of the mean": trained & ~tested,
    }
    lines = []
    for rule, fired in rules.items():
        names = [test_set.classes[c] for c in np.flatnonzero(fired)]
        if names:
            shown = ", ".join(names[:8]) + " …" * (len(names) > 8)
            lines.append(f"{len(names)} × class {rule} ({shown})")
    return lines


class Pictures:
    """Decoded images by index, uint8 (H, W, 3); kept in memory where they are few and each is needed twice."""

    def __init__(self, images: DetectionSet, draws: int) -> None:
        self.images = images
        self.kept: list[np.ndarray] | None = None
        if 3 * int(images.sizes.prod(1).sum()) <= IN_MEMORY and draws >= 2 * len(images):
            with ThreadPoolExecutor(READERS) as pool:
                found = pool.map(self.read, range(len(images)))
                self.kept = list(progress(found, desc="decoding", total=len(images), unit="img", delay=2))

    def read(self, index: int) -> np.ndarray:
        """Image `index`, in the frame of its boxes."""
        if self.kept is not None:
            return self.kept[index]
        return read_rgb(self.images.paths[index], frame=self.images.sizes[index])


class TrainViews:
    """Training batches; what they hold is `collate_ssd`'s or `collate_frcnn`'s, and "ids".

    With `trained` none will be asked for: nothing is decoded ahead.
    """

    def __init__(
        self, images: DetectionSet, recipe: DetectionRecipe, mean: Sequence[float], trained: bool = False
    ) -> None:
        self.images, self.recipe = images, recipe
        self.fill = [round(255 * v) for v in mean]
        self.pictures = Pictures(images, 0 if trained else recipe.length(len(images)) * recipe.batch)
        self.workers = min(MOST_WORKERS, os.cpu_count() or 1) if torch.cuda.is_available() else 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int], rngs: list[np.random.Generator]) -> dict[str, Any]:
        """One view of each image, drawn from its own stream. "ids" name image and smallest box, for the NaN guard."""
        views = [self._view(index, rng) for index, rng in zip(indices, rngs)]
        collate = collate_ssd if isinstance(self.recipe, SSDRecipe) else collate_frcnn
        return {**collate(views), "ids": [self._name(index) for index in indices]}

    def _view(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        recipe, picture = self.recipe, self.pictures.read(index)
        boxes, labels = self.images.boxes[index], self.images.labels[index]
        if not recipe.keep_difficult:
            easy = ~self.images.difficult[index]
            boxes, labels = boxes[easy], labels[easy]
        if isinstance(recipe, FasterRCNNRecipe):
            sides = recipe.short_sides
            short = sides[rng.integers(len(sides))] if sides else recipe.short_side
            view = *frcnn_view(picture, boxes, rng, short, recipe.long_side), labels
        else:
            options = {"expand": recipe.expand, "crop": recipe.crop, "photometric": recipe.photometric}
            view = ssd_view(picture, boxes, labels, rng, self.fill, policy=recipe.aug, **options)
        self._check(index, view[1])
        return view

    def _check(self, index: int, seen: np.ndarray) -> None:
        """Refuse a training box without area: its logarithm would spoil the loss. Raises UserError naming it."""
        if len(seen) and not (seen[:, 2:] > seen[:, :2]).all():  # also where a number is not finite
            raise UserError(
                f"{self.images.paths[index]}: {self._name(index)} has no area in its training view; "
                "correct or remove it"
            )

    def _name(self, index: int) -> str:
        """An image's id with its smallest box."""
        boxes = self.images.boxes[index]
        if not len(boxes):
            return f"{self.images.ids[index]} (no box)"
        k = int(np.nan_to_num(boxes[:, 2:] - boxes[:, :2], nan=-np.inf).min(1).argmin())
        corners = ", ".join(f"{v:g}" for v in boxes[k].tolist())
        label = self.images.classes[self.images.labels[index][k]]
        return f"{self.images.ids[index]} (smallest box: {label} {corners})"


def collate_ssd(views: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    """Stack equal images (N, H, W, 3); pad boxes to (N, M, 4) with 0 and labels to (N, M) with -1."""
    most = max(1, *(len(labels) for _, _, labels in views))
    boxes = torch.zeros(len(views), most, 4)
    padded = torch.full((len(views), most), -1)
    for i, (_, box, labels) in enumerate(views):
        boxes[i, : len(box)] = torch.from_numpy(box)
        padded[i, : len(labels)] = torch.from_numpy(labels)
    return {"images": torch.from_numpy(np.stack([v[0] for v in views])), "boxes": boxes, "labels": padded}


def collate_frcnn(views: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Pad images at the right and bottom to (N, H, W, 3); `sizes` as [height, width], boxes and labels as lists."""
    sizes = [list(image.shape[:2]) for image, _, _ in views]
    padded = np.zeros((len(views), *np.max(sizes, 0), 3), np.uint8)
    for row, (image, _, _) in zip(padded, views):
        row[: image.shape[0], : image.shape[1]] = image
    return {
        "images": torch.from_numpy(padded),
        "sizes": sizes,
        "boxes": [torch.from_numpy(boxes) for _, boxes, _ in views],
        "labels": [torch.from_numpy(labels) for _, _, labels in views],
    }


def read_ahead(
    batches: Iterable[Sequence[int]], load: Callable[[int], np.ndarray]
) -> Iterator[tuple[Sequence[int], list[np.ndarray]]]:
    """(indices, loaded images) of each batch, two batches ahead of their use."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque = deque()
        for batch in batches:
            ahead.append((batch, [pool.submit(load, index) for index in batch]))
            if len(ahead) > 2:
                indices, futures = ahead.popleft()
                yield indices, [future.result() for future in futures]
        while ahead:
            indices, futures = ahead.popleft()
            yield indices, [future.result() for future in futures]
