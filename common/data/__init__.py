"""Data sets by one spec: `open_*` reads annotations and checks images, and decodes nothing."""

from common.data.spec import DataSpec, parse_data
from common.data.types import CaptionSet, DetectionSet, ImageSet

__all__ = [
    "CaptionSet",
    "DataSpec",
    "DetectionSet",
    "ImageSet",
    "open_captions",
    "open_classification",
    "open_detection",
    "open_localisation",
    "parse_data",
]


def open_classification(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Training and test images of `scenes`, `folder` or `cub`, as (train, test).

    `limit` keeps that many images of each. Every kept image is checked (present, header, end of file):
    the first bad one raises UserError, or with `skip_bad` all bad ones are left out and counted.
    """
    raise NotImplementedError


def open_localisation(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[ImageSet, ImageSet]:
    """As `open_classification`, of `scenes`, `cub` or `folder` with `boxes=`; the test images have boxes.

    No test image is also a training image.
    """
    raise NotImplementedError


def open_detection(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[DetectionSet, DetectionSet]:
    """Training and test images with boxes of `scenes` or `voc`, as (train, test); checks as above."""
    raise NotImplementedError


def open_captions(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[CaptionSet, CaptionSet]:
    """Training and test images with captions of `scenes` or `captions`, as (train, test); checks as above."""
    raise NotImplementedError
