"""Tiny data for all rooms, written by fixtures; caches go to a folder of the test session."""

import os
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from backbench.common.base.errors import UserError

pytest.register_assert_rewrite("shapes", "synthetic_cells", "planned_cells")  # they hold fixtures

PATIENCE = 1800  # seconds that anything may take: no result depends on how fast the machine is

torch.set_num_threads(1)  # the suite's networks are too small to share among threads


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """All caches (rendered world, decoded images, references) in one folder that lives as long as the session."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["BACKBENCH_CACHE"] = str(folder)
    os.environ["BACKBENCH_QUIET"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"  # of child processes
    return folder


def write_class_folders(
    root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog", "fox"), side: int = 40
):
    """ImageFolder data: train/CLASS/N.jpg and val/CLASS/N.jpg; a class is a colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                image = rng.integers(0, 90, (side, side + 8, 3)).astype(np.uint8)
                image[..., label % 3] += 120
                cv2.imwrite(str(folder / f"{number}.jpg"), image)
    return root


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory):
    """A folder of 3 classes × 6 images a split."""
    return write_class_folders(tmp_path_factory.mktemp("classes"))


def picture(path: Path, size=(20, 10), seed=0, **save) -> Path:
    """Write an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **save)
    return path


def wait_until(condition, process: subprocess.Popen | None = None):
    """What the condition gives, once it is true; half an hour is for a machine under any load.

    Fails at once where `process`, which should bring it about, has ended without.
    """
    until = time.monotonic() + PATIENCE
    while True:
        ended = process is not None and process.poll() is not None
        if found := condition():
            return found
        assert not ended, f"the process ended with code {process.returncode}"
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def fails(call, *parts: str) -> str:
    """The one-line message of the UserError that `call` raises; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message
