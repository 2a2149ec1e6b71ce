"""Out-of-distribution images: noise, any folder of images, or the test images of another data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, user_path
from backbench.common.data import open_classification, parse_data
from backbench.common.data.check import check_images
from backbench.common.data.decode import Fit, centre_crop, decode_all, resize_short
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import EXTENSIONS, Report, files_below, found, need_folder, short_name
from backbench.common.data.registry import OPTIONS
from backbench.common.data.types import ImageSet
from backbench.pretrain.recipes import RobustnessRecipe
from backbench.pretrain.stress import noise

NOISE = ("uniform", "gaussian")
FITS = ("crop", "resize")
PAPER = (  # the paper's seven sets, by the names under which its values are quoted
    *("tiny_imagenet_crop", "tiny_imagenet_resize", "lsun_crop", "lsun_resize", "isun"),
    *NOISE,
)


@dataclass(frozen=True)
class Outliers:
    """A set of images of other data. `images` is None for noise; `fit` is crop, resize, or "" as the test images."""

    name: str
    count: int
    fingerprint: str
    images: ImageSet | None = None
    fit: str = ""

    @property
    def ids(self) -> list[str]:
        """An id for each image that names its set."""
        own = range(self.count) if self.images is None else self.images.ids
        return [f"{self.name}/{one}" for one in own]

    def reader(self, recipe: RobustnessRecipe, seed: int) -> Callable[[slice], np.ndarray]:
        """What gives a part of its images, (N, size, size, 3): uint8, or noise as float32 in [0, 1]."""
        size = recipe.size
        if self.images is None:
            return lambda part: noise(self.name, part.start, part.stop - part.start, size, seed)
        if self.fit == "crop":
            fit: Callable = Window(size, recipe.resize_backend)
        else:
            fit = Fit(size, size, None if self.fit else recipe.resize, recipe.resize_backend)
        if self.images.pixels is None:
            return decode_all(self.images.paths, fit).__getitem__
        return np.stack([fit(image) for image in self.images.pixels]).__getitem__


@dataclass(frozen=True)
class Window:
    """The central `side` × `side` pixels as they are; of a smaller image, after its short side was enlarged to it."""

    side: int
    backend: str

    @property
    def name(self) -> str:
        return f"window-{self.side}-{self.backend}"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        small = min(image.shape[:2]) < self.side
        return centre_crop(
            resize_short(image, self.side, self.backend) if small else image, (self.side, self.side)
        )


def open_outliers(specs: Sequence[str], most: int, skip_bad: bool = False) -> list[Outliers]:
    """The sets that `--ood` names, at most `most` images each.

    `uniform`, `gaussian`, or NAME=folder:DIR (every image below DIR), NAME=KIND:PATH… (the test images of a `--data`),
    each with `,crop` or `,resize` at the end where its images are not to be treated as the test images are. Raises
    UserError for anything else, for a folder without images and for a name given twice.
    """
    sets = [_open(spec, most, skip_bad) for spec in specs]
    names = [one.name for one in sets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--ood: two sets are named {twice}; write another name before the =")
    return sets


def _open(spec: str, most: int, skip_bad: bool) -> Outliers:
    if spec in NOISE:
        return Outliers(spec, most, digest("noise 1", spec, most))
    name, equals, rest = spec.partition("=")
    if not equals or not name or not rest:
        raise UserError(f"--ood {spec}: write {', '.join(NOISE)}, NAME=folder:DIR or NAME=KIND:PATH")
    if name in NOISE:
        raise UserError(f"--ood {spec}: {name} is the built-in noise; give the set another name")
    there = user_path(rest.removeprefix("folder:")).is_dir()  # a folder may be named so
    fit = next((fit for fit in FITS if rest.endswith(f",{fit}") and not there), "")
    rest = rest.removesuffix(f",{fit}") if fit else rest
    kind, _, path = rest.partition(":")
    if kind in OPTIONS and kind != "folder":
        images = open_classification(parse_data(rest), None, skip_bad)[1]
    else:
        images = _folder(user_path(path if kind == "folder" else rest), spec, skip_bad)
    images = images.subset(most)
    return Outliers(short_name(name), len(images), digest(images.fingerprint, fit), images, fit)


def _folder(root: Path, spec: str, skip_bad: bool) -> ImageSet:
    need_folder(root, "images, at any depth")
    report = Report()
    paths = sorted(files_below(root, root, report))
    if not paths:
        raise UserError(
            f"--ood {spec}: no image below {root} ({found(root)}); images are {', '.join(EXTENSIONS)}"
        )
    ids = [str(path.relative_to(root)) for path in paths]
    key = fingerprint("images of a folder", ids, paths, [])
    labels = np.zeros(len(ids), np.int64)
    made = ImageSet(
        short_name(root.resolve().name), [], ids, paths, labels, fingerprint=key, report=report.lines()
    )
    bad = check_images(paths, skip_bad)
    if len(bad) == len(paths):
        raise UserError(f"--ood {spec}: none of the {len(paths)} images below {root} can be read")
    return made.without(bad)
