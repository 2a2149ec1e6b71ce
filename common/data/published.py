"""The published sets: how many images, classes and boxes they have, and what a set on disk lacks of them."""

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.decode import read_headers
from backbench.common.data.layout import need_folder, printable
from backbench.common.data.readers.cifar import locate
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import CaptionSet, DetectionSet, ImageSet

AnySet = ImageSet | DetectionSet | CaptionSet
Parts = dict[str, AnySet]

# images of a split; of VOC also its objects that are not difficult (as VOC's pages count), of COCO its captions
VOC = {
    ("VOC2007", "train"): (2_501, 6_301),
    ("VOC2007", "val"): (2_510, 6_307),
    ("VOC2007", "trainval"): (5_011, 12_608),
    ("VOC2007", "test"): (4_952, 12_032),
    ("VOC2012", "train"): (5_717, 13_609),
    ("VOC2012", "val"): (5_823, 13_841),
    ("VOC2012", "trainval"): (11_540, 27_450),
}
COCO = {
    "train2014": (82_783, 414_113),
    "val2014": (40_504, 202_654),
    "train2017": (118_287, 591_753),
    "val2017": (5_000, 25_014),
}
IMAGENET = {"train": 1_281_167, "val": 50_000}
IMAGENET_BOXED = 544_546  # training images that have boxes
IMAGENET_VAL_BOXES = 80_477
TINY_IMAGENET = {"train": 100_000, "val": 10_000}
TINY_CLASSES = 200
IMAGENETTE = {"train": 9_469, "val": 3_925}
CUB = {"train": 5_994, "test": 5_794}
CIFAR = {"train": 50_000, "test": 10_000}
CIFAR_MEAN = {"cifar10": (125.3, 123.0, 113.9), "cifar100": (129.3, 124.1, 112.4)}  # of the training pixels
FIRST_CUB_TEST_BOX = (60, 27, 385, 331)


class Findings:
    """The lines of a verification, printed as they come; `problems` counts those that make it fail."""

    def __init__(self) -> None:
        self.problems = 0

    def say(self, state: str, text: str) -> None:
        """Print a line: `ok`, `note` (nothing to mend), `differs` (from the published set) or `PROBLEM`."""
        self.problems += state == "PROBLEM"
        print(f"{state:<8}{printable(' '.join(text.split()))}", flush=True)

    def count(self, what: str, number: int, published: int | None, otherwise: str = "differs") -> None:
        """Compare a count with the published one, where there is one."""
        if published is None or number == published:
            self.say("ok", f"{number:,} {what}{'' if published is None else ', as published'}")
        elif number < published:
            self.say(otherwise, f"a subset: {number:,} of the {published:,} {what} that are published")
        else:
            self.say(otherwise, f"{number:,} {what}, {published:,} are published")


def of_folder(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """Class folders: Imagenette's and ImageNet's are known by their names."""
    classes = parts["train"].classes
    findings.say("ok", f"{counted(len(classes), 'class', 'classes')}: {_few(classes)}")
    from torchvision.datasets import Imagenette

    published = {}
    if set(classes) == set(Imagenette._WNID_TO_CLASS):
        published = IMAGENETTE
    elif len(classes) == 1000 and all(map(_is_wnid, classes)):
        published = IMAGENET
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), published.get(name))
        sizes = np.bincount(part.labels, minlength=len(classes))
        low, high = int(sizes.argmin()), int(sizes.argmax())
        findings.say(
            "ok",
            f"{name}: {sizes[low]:,} ({classes[low]}) to {sizes[high]:,} ({classes[high]}) images a class",
        )


def before_imagenet(spec: DataSpec, findings: Findings) -> None:
    """UserError for two ways in which ImageNet is often unpacked and not read."""
    root = need_folder(spec.path, "train/<wnid>/ and val/<wnid>/ of ILSVRC2012")
    if (root / "Data" / "CLS-LOC").is_dir():
        raise UserError(f"{root}: the class folders lie deeper; give imagenet:{root / 'Data' / 'CLS-LOC'}")
    flat = next((root / "val").glob("ILSVRC2012_val_*"), None) if (root / "val").is_dir() else None
    if flat:
        raise UserError(
            f"{flat}: the validation images are not sorted into val/<wnid>/; torchvision.datasets.ImageNet sorts them"
        )


def of_ilsvrc(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """ILSVRC's images, and its boxes where they are given."""
    of_imagenet(spec, parts, findings)
    if parts["train"].boxes is not None:
        boxed = int(parts["train"].boxed.sum())
        findings.count("train images with boxes", boxed, IMAGENET_BOXED)
    if parts["val"].boxes is not None:
        findings.count("val boxes", sum(map(len, parts["val"].boxes)), IMAGENET_VAL_BOXES)


def of_imagenet(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """Are these ILSVRC2012's classes, all of them, with as many images as published?"""
    classes, folder = parts["train"].classes, parts["train"].paths[0].parents[1]
    known = _synsets()
    if known:
        lost, foreign = sorted(set(known) - set(classes)), sorted(set(classes) - set(known))
    else:
        lost, foreign = [], [name for name in classes if not _is_wnid(name)]
    if len(classes) == 1000 and not lost and not foreign:
        findings.say("ok", f"1000 classes: {_few(classes)}")
    else:
        lacking = f"; missing: {_few(lost)}" if lost else ""
        strange = f"; not of ILSVRC2012: {_few(foreign)}" if foreign else ""
        findings.say("PROBLEM", f"{folder}: {len(classes)} of 1000 classes{lacking}{strange}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), IMAGENET[name], "PROBLEM")
        sizes = np.bincount(part.labels, minlength=len(classes))
        # every class has 50 validation images and 732 to 1,300 to train on
        wrong = sizes != 50 if name == "val" else (sizes < 732) | (sizes > 1300)
        expected = "50" if name == "val" else "732 to 1,300"
        if wrong.any():
            shown = [f"{classes[i]} {sizes[i]}" for i in np.flatnonzero(wrong)]
            findings.say("PROBLEM", f"{name}: {len(shown)} classes without {expected} images: {_few(shown)}")
        else:
            findings.say("ok", f"{name}: {expected} images in every class")


def of_tiny_imagenet(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """Tiny-ImageNet's 200 classes, all images with their boxes."""
    classes = parts["train"].classes
    state = "ok" if len(classes) == TINY_CLASSES else "PROBLEM"
    findings.say(state, f"{len(classes)} of {TINY_CLASSES} classes: {_few(classes)}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), TINY_IMAGENET[name], "PROBLEM")
        _equally_many(name, part, TINY_IMAGENET[name], findings)
        lost = int((~part.boxed).sum())
        findings.say("PROBLEM" if lost else "ok", f"{name}: {len(part) - lost:,} images have their box")


def before_cifar(spec: DataSpec, findings: Findings) -> None:
    """Which version is there, and do its files have the published MD5?"""
    folder, files = locate(spec)
    findings.say("ok", f"{folder}: the {'binary' if files.labels else 'python'} version of {spec.kind}")
    if files.labels:
        return
    from torchvision import datasets

    peer = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[spec.kind]
    sums = [*peer.train_list, *peer.test_list, (peer.meta["filename"], peer.meta["md5"])]
    there = [(folder / name, md5) for name, md5 in sums if (folder / name).is_file()]
    wrong = [path for path, md5 in there if file_md5(path) != md5]
    for path in wrong:
        findings.say("PROBLEM", f"{path}: its MD5 is not the published one; unpack the archive again")
    if not wrong and len(there) == len(sums):
        findings.say("ok", f"{len(sums)} files with the published MD5")


def of_cifar(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """CIFAR's images, classes and mean colour."""
    classes, count = parts["train"].classes, int(spec.kind.removeprefix("cifar"))
    names = f"classes: {_few(classes)}"
    findings.say("ok" if len(classes) == count else "PROBLEM", f"{len(classes)} {names}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), CIFAR[name], "PROBLEM")
        _equally_many(name, part, CIFAR[name], findings)
    if len(parts["train"]) == CIFAR["train"]:
        mean = parts["train"].pixels.mean((0, 1, 2))
        same = np.abs(mean - CIFAR_MEAN[spec.kind]).max() < 0.1
        shown = " ".join(f"{value:.1f}" for value in mean)
        findings.say(
            "ok" if same else "PROBLEM", f"mean training pixel {shown}, published {CIFAR_MEAN[spec.kind]}"
        )


def of_cub(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """CUB's 200 classes, its images, and the first box of its test set."""
    classes, test = parts["train"].classes, parts["test"]
    findings.say("ok" if len(classes) == 200 else "PROBLEM", f"{len(classes)} classes: {_few(classes)}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), CUB[name], "PROBLEM")
    width, height = read_headers(test.paths[:1])[0, :2]
    first = (test.boxes[0] * [width, height, width, height]).round().astype(int).tolist()
    same = first == [list(FIRST_CUB_TEST_BOX)] and (width, height) == (500, 335)
    shown = f"first test box {first[0] if first else 'none'} in {width} × {height}"
    findings.say("ok" if same else "PROBLEM", f"{shown}, published {list(FIRST_CUB_TEST_BOX)} in 500 × 335")


def of_voc(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """VOC's images and objects, a line a year and split."""
    splits = {"train": spec.options.get("train", "trainval"), "test": spec.options.get("test", "test")}
    for name, part in parts.items():
        years = np.array([_voc_year(path) for path in part.paths])
        for year in dict.fromkeys(years.tolist()):
            here = part.take(np.flatnonzero(years == year))
            images, objects = VOC.get((year, splits[name]), (None, None))
            findings.count(f"images of {year} {splits[name]}", len(here), images)
            hard = sum(int(flags.sum()) for flags in here.difficult)
            easy = sum(map(len, here.difficult)) - hard
            classes = f"{counted(len(here.classes), 'class', 'classes')}: {_few(here.classes)}"
            whole = objects if len(here) == images else None
            findings.count(f"objects (and {hard:,} difficult) of {classes}", easy, whole)


def _voc_year(path: Path) -> str:
    """The folder that holds JPEGImages."""
    parts = path.absolute().parts
    return parts[len(parts) - 2 - parts[::-1].index("JPEGImages")]


def of_coco(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """COCO's images, and the objects of any set in its format."""
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), _of_coco(part)[0])
        objects = counted(sum(map(len, part.boxes)), "object", "objects")
        classes = counted(len(part.classes), "class", "classes")
        findings.say("ok", f"{name}: {objects} of {classes}")


def of_captions(spec: DataSpec, parts: Parts, findings: Findings) -> None:
    """COCO's images and captions."""
    for name, part in parts.items():
        images, captions = _of_coco(part)
        findings.count(f"{name} images", len(part), images)
        whole = len(part) == images
        findings.count(f"{name} captions", sum(map(len, part.captions)), captions if whole else None)


def _of_coco(part: AnySet) -> tuple[int | None, int | None]:
    return COCO.get(part.paths[0].parent.name, (None, None))


def _equally_many(name: str, part: ImageSet, whole: int, findings: Findings) -> None:
    sizes = np.bincount(part.labels, minlength=len(part.classes))
    if len(part) == whole and (sizes != sizes[0]).any():
        findings.say("PROBLEM", f"{name}: {sizes.min()} to {sizes.max()} images a class, not equally many")


def counted(number: int, one: str, many: str) -> str:
    """`1 class`, `2 classes`, `1,000 classes`."""
    return f"{number:,} {one if number == 1 else many}"


def file_md5(path: Path) -> str:
    """The MD5 of a file's content, as published beside archives. Raises UserError naming an unreadable file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _synsets() -> list[str]:
    """ILSVRC2012's 1000 class folders, from timm's tables where timm is installed."""
    found = importlib.util.find_spec("timm")
    table = Path(found.origin).parent / "data" / "_info" / "imagenet_synsets.txt" if found else None
    return table.read_text(encoding="utf-8-sig").split() if table and table.is_file() else []


def _is_wnid(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
