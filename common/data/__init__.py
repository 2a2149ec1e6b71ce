"""Data sets by one spec: `open_*` reads annotations and checks images, and decodes nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

from backbench.common.base.errors import UserError
from backbench.common.data.check import check_images
from backbench.common.data.layout import short_name
from backbench.common.data.overlap import refuse_copies
from backbench.common.data.readers.captions import read_captions
from backbench.common.data.readers.cifar import read_cifar
from backbench.common.data.readers.coco import read_coco
from backbench.common.data.readers.cub import read_cub
from backbench.common.data.readers.folder import read_folder
from backbench.common.data.readers.ilsvrc import read_ilsvrc
from backbench.common.data.readers.tiny_imagenet import read_tiny_imagenet
from backbench.common.data.readers.voc import read_voc
from backbench.common.data.registry import DataSpec, parse_data
from backbench.common.data.types import CaptionSet, DetectionSet, ImageSet

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
    "read_parts",
]

AnySet = TypeVar("AnySet", ImageSet, DetectionSet, CaptionSet)


def open_classification(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Training and test images of a kind of image set (`read_parts` below), as (train, test).

    `limit` keeps that many images of each. Every kept image is checked (present, header, end of file):
    the first bad one raises UserError, or with `skip_bad` all bad ones are left out and counted.
    """
    return _open("classification", spec, limit, skip_bad)


def open_localisation(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[ImageSet, ImageSet]:
    """As `open_classification`, of sets with boxes; the test images have boxes.

    An image that is also a training image is refused.
    """
    train, test = _open("localisation", spec, limit, skip_bad)
    refuse_copies(train, test)
    return train, test


def open_detection(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[DetectionSet, DetectionSet]:
    """Training and test images with boxes of `scenes`, `voc` or `coco`, as (train, test); checks as above."""
    return _open("detection", spec, limit, skip_bad)


def open_captions(
    spec: DataSpec | str, limit: int | None = None, skip_bad: bool = False
) -> tuple[CaptionSet, CaptionSet]:
    """Training and test images with captions of `scenes` or `captions`, as (train, test); checks as above."""
    return _open("captioning", spec, limit, skip_bad)


def _of_scenes(kind: str, folder: str, reader: Callable[[DataSpec], tuple]) -> Callable[[DataSpec], tuple]:
    def read(spec: DataSpec) -> tuple:
        from backbench.common.data.scenes import ensure_world

        size, seed = spec.options.get("size", "tiny"), spec.options.get("seed", "0")
        if not seed.isdecimal():
            raise UserError(f"--data {spec}: seed={seed} is no whole number")
        world = ensure_world(size=size, seed=int(seed))
        name = spec.options.get("name", f"scenes-{size}" + (f"-seed{seed}" if int(seed) else ""))
        return reader(DataSpec(kind, str(getattr(world, folder)), {"name": short_name(name)}))

    return read


def read_parts(task: str, spec: DataSpec | str) -> tuple[AnySet, AnySet]:
    """The sets that a task trains on and scores, as every `open_*` begins: read, their images not checked.

    `task`: classification, localisation, detection or captioning. UserError for what the reader refuses, and for a
    kind that the task does not read.
    """
    readers = {
        "classification": {
            "folder": read_folder,
            "cub": read_cub,
            "ilsvrc": read_ilsvrc,
            "tiny_imagenet": read_tiny_imagenet,
            "cifar10": read_cifar,
            "cifar100": read_cifar,
            "scenes": _of_scenes("folder", "imagenet", read_folder),
        },
        "localisation": {
            "folder": lambda spec: read_folder(spec, localise=True),
            "cub": read_cub,
            "ilsvrc": lambda spec: read_ilsvrc(spec, localise=True),
            "tiny_imagenet": read_tiny_imagenet,
            "scenes": _of_scenes("cub", "cub", read_cub),
        },
        "detection": {
            "voc": read_voc,
            "coco": read_coco,
            "scenes": _of_scenes("voc", "vocdevkit", read_voc),
        },
        "captioning": {
            "captions": read_captions,
            "scenes": _of_scenes("captions", "coco", read_captions),
        },
    }[task]
    spec = parse_data(spec) if isinstance(spec, str) else spec
    if spec.kind not in readers:
        raise UserError(f"--data {spec}: {task} does not read '{spec.kind}'; it reads {', '.join(readers)}")
    return readers[spec.kind](spec)


def _open(task: str, spec: DataSpec | str, limit: int | None, skip_bad: bool) -> Any:
    return tuple(_checked(part.subset(limit), skip_bad) for part in read_parts(task, spec))


def _checked(part: AnySet, skip_bad: bool) -> AnySet:
    if getattr(part, "pixels", None) is not None:  # nothing is left to decode
        return part
    bad = check_images(part.paths, skip_bad)
    if len(bad) == len(part):
        raise UserError(f"{part.paths[0]}: none of the {len(part)} images of {part.name} can be read")
    return part.without(bad)
