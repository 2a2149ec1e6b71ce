"""A detector's chance: its detections on other images."""

from dataclasses import replace

import numpy as np
import pytest

from backbench.common.data.types import DetectionSet
from backbench.common.engine import SPLIT, stream
from backbench.common.metrics.average_precision import Boxes
from backbench.detection.chance import DRAWS, chance, other_images
from backbench.detection.scores import cell_statistics, scores


def detector(rng, classes, images=30, copies=1.0):
    """A set, and a detector that finds `copies` of its objects and as many other boxes, scores tied."""
    sizes = rng.integers(60, 120, (images, 2))
    owner = np.sort(rng.integers(0, images, 2 * images))
    low = rng.uniform(0, 0.6, (2 * images, 2)) * sizes[owner]
    box = np.hstack([low, low + rng.uniform(0.2, 0.4, (2 * images, 2)) * sizes[owner]]).astype(np.float32)
    label, hard = rng.integers(0, classes, 2 * images), rng.random(2 * images) < 0.2
    cuts = np.cumsum(np.bincount(owner, minlength=images))[:-1]
    parts = (np.split(value, cuts) for value in (box, label, hard))
    names = [f"class{c}" for c in range(classes)]
    made = DetectionSet("x", names, list(range(images)), [None] * images, sizes, *parts)
    right = rng.random(2 * images) < copies
    other = rng.integers(0, images, 2 * images)
    found = Boxes(
        np.concatenate([owner[right], other]),
        np.concatenate([label[right], rng.integers(0, classes, 2 * images)]),
        np.concatenate([box[right], box]),
        np.concatenate([np.full(right.sum(), 0.75), rng.integers(1, 8, 2 * images) / 10]),
    )
    order = np.argsort(found.image, kind="stable")
    return Boxes(found.image[order], found.label[order], found.box[order], found.score[order]), made


@pytest.mark.parametrize("classes", [1, 3])
def test_chance_is_the_score_of_detections_carried_to_other_images(classes):
    found, images = detector(np.random.default_rng(classes), classes)
    rng, drawn = stream(SPLIT, 0), []
    for _ in range(DRAWS):
        home = other_images(len(images), rng)  # of each image's objects: whose detections come here
        goes = np.argsort(home)[found.image]
        scale = np.tile(images.sizes[goes] / images.sizes[found.image], 2)
        drawn.append(scores(cell_statistics(replace(found, image=goes, box=found.box * scale), images)))
    expected = {name: np.mean([one[name] for one in drawn]) for name in drawn[0]}
    assert set(expected) == {"mAP", "mAP_area", "AP", "AP50", "AP75"}
    assert chance(found, images) == pytest.approx(expected, abs=1e-12)
    assert chance(found, images) == chance(found, images)


def test_a_good_detector_of_one_class_is_above_chance():
    found, images = detector(np.random.default_rng(0), classes=1)
    assert scores(cell_statistics(found, images))["mAP"] > 0.9
    assert 0 < chance(found, images)["mAP"] < 0.3


def test_a_detector_that_knows_nothing_of_the_images_is_at_chance():
    _, images = detector(np.random.default_rng(1), classes=1, images=200)
    rng = np.random.default_rng(2)
    share = np.sort(rng.random((2000, 2, 2)), 1).reshape(-1, 4)
    image = np.repeat(np.arange(200), 10)
    box = share * np.tile(images.sizes[image], 2)
    found = Boxes(image, np.zeros(2000, np.int64), box, rng.random(2000))
    assert chance(found, images)["mAP_area"] == pytest.approx(
        scores(cell_statistics(found, images))["mAP_area"], abs=0.01
    )


def test_every_image_gets_another_one_and_a_single_image_has_no_chance():
    for images in (2, 3, 7, 50):
        for seed in range(20):
            other = other_images(images, np.random.default_rng(seed))
            assert sorted(other) == list(range(images)) and (other != np.arange(images)).all()
    found, images = detector(np.random.default_rng(3), classes=2)
    mine = found.image == 0
    one = Boxes(found.image[mine], found.label[mine], found.box[mine], found.score[mine])
    assert chance(one, images.take([0])) == {}


def test_nothing_detected_has_a_chance_of_nothing():
    _, images = detector(np.random.default_rng(4), classes=2)
    nothing = Boxes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
    assert set(chance(nothing, images).values()) == {0.0}
