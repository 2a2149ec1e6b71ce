"""Metrics as pure functions on arrays; each takes per-image weights, so that scores can be resampled."""

from collections.abc import Mapping

import numpy as np

from backbench.common.metrics import captions, classification, detection, localisation, robustness

MODULES = {
    "classification": classification,
    "detection": detection,
    "captioning": captions,
    "wsol": localisation,
    "robustness": robustness,
}


def rescore(
    task: str, images: Mapping[str, np.ndarray], weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """All metrics of a cell from its per-image statistics (images.npz), for R sets of image weights.

    `weights` is (R, n_images), None for all ones (R = 1); each value is an (R,) array of fractions.
    """
    return MODULES[task].rescore(images, weights)
