"""From images to detections, with either detector."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from backbench.common.base.progress import progress
from backbench.common.data.decode import read_rgb
from backbench.common.data.types import DetectionSet
from backbench.common.engine import autocast
from backbench.common.metrics.average_precision import Boxes
from backbench.detection.augment import resize, scaled_size
from backbench.detection.data import read_ahead
from backbench.detection.faster_rcnn import FasterRCNN, need_finite
from backbench.detection.recipes import FasterRCNNRecipe, SSDRecipe
from backbench.detection.ssd import SSD300, detect

SIDE = 300


def predict(model: SSD300 | FasterRCNN, images: DetectionSet, recipe, device: torch.device) -> Boxes:
    """Detections of every image, in the images' order, best first, boxes in pixels of the images."""
    model.to(device).eval()
    single = _predict_ssd if isinstance(recipe, SSDRecipe) else _predict_frcnn
    found: list[dict[str, np.ndarray]] = [{}] * len(images)
    with torch.inference_mode(), progress(desc="detecting", total=len(images), unit="img", delay=2) as bar:
        for indices, batch in single(model, images, recipe, device):
            for i, one in zip(indices, batch):
                found[i] = {k: v.float().cpu().numpy() for k, v in one.items()}
            bar.update(len(indices))
    counts = [len(one["scores"]) for one in found]
    return Boxes(
        image=np.repeat(np.arange(len(images)), counts),
        label=np.concatenate([one["labels"] for one in found]).astype(np.int64),
        box=np.concatenate([one["boxes"] for one in found]),
        score=np.concatenate([one["scores"] for one in found]),
    )


Batches = Iterator[tuple[Sequence[int], list[dict[str, Tensor]]]]


def _predict_ssd(model: SSD300, images: DetectionSet, recipe: SSDRecipe, device: torch.device) -> Batches:
    def load(index: int) -> np.ndarray:
        return resize(read_rgb(images.paths[index], frame=images.sizes[index]), SIDE, SIDE)

    order = np.arange(len(images))
    batches = [order[k : k + recipe.test_batch] for k in range(0, len(order), recipe.test_batch)]
    for indices, pictures in read_ahead(batches, load):
        with autocast(recipe.eval_precision, device):
            offsets, logits = model(torch.from_numpy(np.stack(pictures)).to(device))
        need_finite(offsets, logits)
        settings = (recipe.score, recipe.nms, recipe.top, recipe.candidates)
        found = detect(offsets, logits, model.priors, *settings)
        for i, one in zip(indices, found):
            one["boxes"] = one["boxes"] * torch.tensor([*images.sizes[i]] * 2, device=device)
        yield indices, found


def _predict_frcnn(
    model: FasterRCNN, images: DetectionSet, recipe: FasterRCNNRecipe, device: torch.device
) -> Batches:
    """Only images of one size share a batch: none is padded, so no result depends on its neighbours."""
    sizes = np.array(
        [scaled_size(*size, recipe.short_side, recipe.long_side) for size in images.sizes.tolist()]
    )

    def load(index: int) -> np.ndarray:
        return resize(read_rgb(images.paths[index], frame=images.sizes[index]), *sizes[index].tolist())

    batches = []
    for size in np.unique(sizes, axis=0):
        same = np.flatnonzero((sizes == size).all(1))
        batches += [same[k : k + recipe.test_batch] for k in range(0, len(same), recipe.test_batch)]
    for indices, pictures in read_ahead(batches, load):
        with autocast(recipe.eval_precision, device):
            found = model(torch.from_numpy(np.stack(pictures)).to(device), [p.shape[:2] for p in pictures])
        for i, one in zip(indices, found):
            scale = images.sizes[i] / sizes[i]
            one["boxes"] = one["boxes"] * torch.tensor([*scale] * 2, dtype=torch.float32, device=device)
        yield indices, found
