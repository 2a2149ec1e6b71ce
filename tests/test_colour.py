"""Colour augmentation against torchvision and the formula."""

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from backbench.common.data.colour import EIGENVALUES, EIGENVECTORS, colour_jitter, lighting


class Fixed:
    """Draws that a test chooses."""

    def __init__(self, order, factors):
        self.order, self.factors = order, factors

    def permutation(self, _):
        return np.array(self.order)

    def uniform(self, low, high, count):
        assert (low, high, count) == (0.6, 1.4, 3)
        return np.array(self.factors)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_jitter_equals_torchvisions(order):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    factors = [0.7, 1.35, 0.9]
    expected = torch.from_numpy(image).permute(2, 0, 1)
    for which, factor in zip(order, factors):
        expected = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[which](expected, factor)
    done = colour_jitter(image, Fixed(order, factors))
    assert done.dtype == np.uint8
    assert np.abs(done.astype(int) - expected.permute(1, 2, 0).numpy()).max() <= 2  # a step rounds by 1


def test_lighting_is_the_published_noise():
    image = np.full((4, 4, 3), 128, np.uint8)
    shifts = np.array([lighting(image, np.random.default_rng(s))[0, 0] - 128.0 for s in range(3000)])
    covariance = EIGENVECTORS @ np.diag((0.1 * 255 * EIGENVALUES) ** 2) @ EIGENVECTORS.T
    assert np.cov(shifts.T) == pytest.approx(covariance + np.eye(3) / 12, rel=0.1, abs=0.4)
    assert np.all(lighting(image, np.random.default_rng(3)) == lighting(image, np.random.default_rng(3)))


def test_lighting_is_the_formula_on_every_pixel():
    image = np.random.default_rng(1).integers(0, 256, (30, 20, 3)).astype(np.uint8)
    image[:2], image[2:4] = 0, 255
    for seed in range(5):
        shift = 255 * (EIGENVECTORS * EIGENVALUES) @ np.random.default_rng(seed).normal(0, 0.1, 3)
        expected = np.clip(np.rint(image + shift), 0, 255)
        for view in (image, image[:, 3:11]):
            done = lighting(view, np.random.default_rng(seed))
            np.testing.assert_array_equal(done, expected if view is image else expected[:, 3:11])
            assert done.dtype == np.uint8
