"""The official CutMix code's colour augmentation: jitter by albumentations' functions, AlexNet's lighting noise.

albumentations is imported where it is used: it takes seconds, and calls the network unless told not to.
"""

import os

import numpy as np

# principal components of ImageNet's RGB/255, the constants of every ImageNet recipe since AlexNet (fb.resnet.torch)
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def colour_jitter(image: np.ndarray, rng: np.random.Generator, strength: float = 0.4) -> np.ndarray:
    """Brightness, contrast and saturation by factors from U(1 − strength, 1 + strength), in random order.

    uint8 (H, W, 3) → the same; each step as torchvision's on uint8 images, within 1 of 255.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    from albumentations.augmentations.pixel import functional as A

    steps = (A.adjust_brightness_torchvision, A.adjust_contrast_torchvision, A.adjust_saturation_torchvision)
    for which, factor in zip(rng.permutation(3), rng.uniform(1 - strength, 1 + strength, 3)):
        image = steps[which](image, np.float32(factor))
    return image


def lighting(image: np.ndarray, rng: np.random.Generator, deviation: float = 0.1) -> np.ndarray:
    """Add AlexNet's colour noise: the principal components weighted by N(0, deviation) × their eigenvalues.

    uint8 (H, W, 3) → the same, rounded and clipped.
    """
    import cv2

    shift = 255 * (EIGENVECTORS * EIGENVALUES) @ rng.normal(0, deviation, 3)
    table = np.clip(np.rint(np.arange(256)[:, None] + shift), 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None])
