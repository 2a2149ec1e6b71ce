"""Is a data set on disk the one it should be? Layout, counts, names and a decoded sample, in seconds."""

import hashlib
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.data.captions import read_captions
from common.data.cifar import locate, read_cifar
from common.data.coco import read_coco
from common.data.cub import read_cub
from common.data.decode import read_headers, read_rgb
from common.data.folder import read_folder
from common.data.ilsvrc import read_ilsvrc
from common.data.layout import need_folder
from common.data.spec import DataSpec, parse_data
from common.data.tiny_imagenet import read_tiny_imagenet
from common.data.types import CaptionSet, DetectionSet, ImageSet
from common.data.voc import read_voc
from common.errors import UserError
from common.progress import progress

AnySet = ImageSet | DetectionSet | CaptionSet

# images of a split; of VOC also its objects that are not difficult (as VOC's pages count), of COCO its captions
VOC = {
    ("VOC2007", "trainval"): (5_011, 12_608),
    ("VOC2007", "test"): (4_952, 12_032),
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
SAMPLE = 64
BLOCK = 4096  # images given to the threads at a time


class Findings:
    """The lines of a verification, printed as they come; `problems` counts those that make it fail."""

    def __init__(self) -> None:
        self.problems = 0

    def say(self, state: str, text: str) -> None:
        """Print a line: `ok`, `note` (nothing to mend), `differs` (from the published set) or `PROBLEM`."""
        self.problems += state == "PROBLEM"
        print(f"{state:<8}{' '.join(text.split())}", flush=True)

    def count(self, what: str, number: int, published: int | None, otherwise: str = "differs") -> None:
        """Compare a count with the published one, where there is one."""
        if published is None or number == published:
            self.say("ok", f"{number:,} {what}{'' if published is None else ', as published'}")
        elif number < published:
            self.say(otherwise, f"a subset: {number:,} of the {published:,} {what} that are published")
        else:
            self.say(otherwise, f"{number:,} {what}, {published:,} are published")


def verify(text: str, full: bool = False, sample: int = SAMPLE) -> int:
    """Verify `KIND:PATH`, printing what is found; 0 when it is fine and 1 when there are problems.

    Kinds: imagenet, ilsvrc (its boxes too), tiny_imagenet, cifar10, cifar100, cub, voc, coco, captions, folder. All
    but the last four name one published set, so whatever lacks is a problem; of voc, coco, captions and folder (and of
    ilsvrc's boxes) a difference from the published numbers is said and no problem.
    `sample` images are decoded, with `full` all. Raises UserError for what is no data spec.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in CHECKS:
        raise UserError(f"{text}: verify takes KIND:PATH, KIND one of {', '.join(CHECKS)}")
    spec = parse_data(f"folder:{rest}" if kind == "imagenet" else text)
    findings, start, parts = Findings(), time.monotonic(), {}
    try:
        parts = CHECKS[kind](spec, findings)
    except UserError as error:
        findings.say("PROBLEM", str(error))
    for name, part in parts.items():
        for line in part.report:
            findings.say("note", f"{name}: {line}")
    _decode(parts, findings, None if full else sample)
    problems = findings.problems
    outcome = "fine" if not problems else f"{problems} problem{'s' if problems > 1 else ''}"
    print(f"{text}: {outcome} ({time.monotonic() - start:.1f} s)")
    return 1 if problems else 0


def _folder(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    parts = dict(zip(("train", "val"), read_folder(spec, localise="boxes" in spec.options)))
    classes = parts["train"].classes
    findings.say("ok", f"{len(classes)} classes: {_few(classes)}")
    from torchvision.datasets import Imagenette

    published = {}
    if set(classes) == set(Imagenette._WNID_TO_CLASS):
        published = IMAGENETTE
    elif len(classes) == 1000 and all(map(_is_wnid, classes)):
        published = IMAGENET
    for name, part in parts.items():
        boxed = part.boxes is not None and name == "val"
        findings.count(f"{name} images", len(part), None if boxed else published.get(name))
        sizes = np.bincount(part.labels, minlength=len(classes))
        low, high = int(sizes.argmin()), int(sizes.argmax())
        findings.say(
            "ok",
            f"{name}: {sizes[low]:,} ({classes[low]}) to {sizes[high]:,} ({classes[high]}) images a class",
        )
        if part.boxes is not None:
            findings.say("ok", f"{name}: {sum(map(len, part.boxes)):,} boxes")
    return parts


def _imagenet(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    root = need_folder(spec.path, "train/<wnid>/ and val/<wnid>/ of ILSVRC2012")
    if (root / "Data" / "CLS-LOC").is_dir():
        raise UserError(f"{root}: the class folders lie deeper; give imagenet:{root / 'Data' / 'CLS-LOC'}")
    flat = next((root / "val").glob("ILSVRC2012_val_*"), None) if (root / "val").is_dir() else None
    if flat:
        raise UserError(
            f"{flat}: the validation images are not sorted into val/<wnid>/; torchvision.datasets.ImageNet sorts them"
        )
    parts = dict(zip(("train", "val"), read_folder(spec)))
    _thousand_classes(root / "train", parts, findings)
    return parts


def _ilsvrc(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    train, val = read_ilsvrc(spec)
    _thousand_classes(train.paths[0].parents[1], {"train": train, "val": val}, findings)
    if train.boxes is not None:
        boxed = int(train.boxed.sum())
        findings.count("train images with boxes", boxed, IMAGENET_BOXED)
    if val.boxes is not None:
        findings.count("val boxes", sum(map(len, val.boxes)), IMAGENET_VAL_BOXES)
    return {"train": train, "val": val}


def _thousand_classes(folder: Path, parts: dict[str, ImageSet], findings: Findings) -> None:
    """Are these ILSVRC2012's classes, all of them, with as many images as published? `folder` names them."""
    classes = parts["train"].classes
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


def _tiny_imagenet(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    parts = dict(zip(("train", "val"), read_tiny_imagenet(spec)))
    classes = parts["train"].classes
    state = "ok" if len(classes) == TINY_CLASSES else "PROBLEM"
    findings.say(state, f"{len(classes)} of {TINY_CLASSES} classes: {_few(classes)}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), TINY_IMAGENET[name], "PROBLEM")
        sizes = np.bincount(part.labels, minlength=len(classes))
        if len(part) == TINY_IMAGENET[name] and (sizes != sizes[0]).any():
            findings.say(
                "PROBLEM", f"{name}: {sizes.min()} to {sizes.max()} images a class, not equally many"
            )
        lost = int((~part.boxed).sum())
        findings.say("PROBLEM" if lost else "ok", f"{name}: {len(part) - lost:,} images have their box")
    return parts


def _cifar(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    folder, files = locate(spec)
    findings.say("ok", f"{folder}: the {'binary' if files.labels else 'python'} version of {spec.kind}")
    if not files.labels:
        from torchvision import datasets

        peer = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[spec.kind]
        sums = [*peer.train_list, *peer.test_list, (peer.meta["filename"], peer.meta["md5"])]
        there = [(folder / name, md5) for name, md5 in sums if (folder / name).is_file()]
        wrong = [path for path, md5 in there if file_md5(path) != md5]
        for path in wrong:
            findings.say("PROBLEM", f"{path}: its MD5 is not the published one; unpack the archive again")
        if not wrong and len(there) == len(sums):
            findings.say("ok", f"{len(sums)} files with the published MD5")
    parts = dict(zip(("train", "test"), read_cifar(spec)))
    classes = parts["train"].classes
    count = int(spec.kind.removeprefix("cifar"))
    names = f"classes: {_few(classes)}"
    findings.say("ok" if len(classes) == count else "PROBLEM", f"{len(classes)} {names}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), CIFAR[name], "PROBLEM")
        sizes = np.bincount(part.labels, minlength=len(classes))
        if len(part) == CIFAR[name] and (sizes != CIFAR[name] // count).any():
            findings.say(
                "PROBLEM", f"{name}: {sizes.min()} to {sizes.max()} images a class, not equally many"
            )
        part.report = []
    mean = parts["train"].pixels.mean((0, 1, 2))
    if len(parts["train"]) == CIFAR["train"]:
        same = np.abs(mean - CIFAR_MEAN[spec.kind]).max() < 0.1
        shown = " ".join(f"{value:.1f}" for value in mean)
        findings.say(
            "ok" if same else "PROBLEM", f"mean training pixel {shown}, published {CIFAR_MEAN[spec.kind]}"
        )
    return parts


def _cub(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    parts = dict(zip(("train", "test"), read_cub(spec)))
    classes, test = parts["train"].classes, parts["test"]
    findings.say("ok" if len(classes) == 200 else "PROBLEM", f"{len(classes)} classes: {_few(classes)}")
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), CUB[name], "PROBLEM")
    width, height = read_headers(test.paths[:1])[0, :2]
    first = (test.boxes[0] * [width, height, width, height]).round().astype(int).tolist()
    same = first == [list(FIRST_CUB_TEST_BOX)] and (width, height) == (500, 335)
    shown = f"first test box {first[0] if first else 'none'} in {width} × {height}"
    findings.say("ok" if same else "PROBLEM", f"{shown}, published {list(FIRST_CUB_TEST_BOX)} in 500 × 335")
    return parts


def _voc(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    root = Path(spec.path)
    if not any(root.glob("VOC[0-9]*")) and (root / "VOCdevkit").is_dir():
        root = root / "VOCdevkit"
    if (root / "Annotations").is_dir() or not any(root.glob("VOC[0-9]*")):
        folders = [root]
    elif "year" in spec.options:
        folders = [root / f"VOC{year}" for year in spec.options["year"].split("+")]
    else:
        folders = sorted(path for path in root.glob("VOC[0-9]*") if path.is_dir())
    parts = {}
    for folder in folders:
        year = folder.resolve().name
        for option, default in (("train", "trainval"), ("test", "test")):
            split = spec.options.get(option, default)
            listed = folder / "ImageSets" / "Main" / f"{split}.txt"
            if option == "test" and "test" not in spec.options and not listed.exists():
                if year == "VOC2007":
                    findings.say("PROBLEM", f"{listed}: no such split; unpack VOCtest_06-Nov-2007.tar there")
                else:
                    findings.say("note", f"{folder.name}: has no test split (VOC2012's was never published)")
                continue
            same = {"train": split, "test": split}
            classes = {key: spec.options[key] for key in ("classes",) if key in spec.options}
            part = read_voc(DataSpec("voc", str(folder), {**same, **classes}))[0]
            name = f"{folder.name} {split}"
            images, objects = VOC.get((year, split), (None, None))
            findings.count(f"images of {name}", len(part), images)
            easy = sum(int((~hard).sum()) for hard in part.difficult)
            hard = sum(map(len, part.difficult)) - easy
            findings.count(
                f"objects (and {hard:,} difficult) of {len(part.classes)} classes: {_few(part.classes)}",
                easy,
                objects if len(part) == images else None,
            )
            parts[name] = part
    return parts


def _coco(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    parts = dict(zip(("train", "val"), read_coco(spec)))
    for name, part in parts.items():
        findings.count(f"{name} images", len(part), _published_coco(part, 0))
        findings.say("ok", f"{name}: {sum(map(len, part.boxes)):,} objects of {len(part.classes)} classes")
    return parts


def _captions(spec: DataSpec, findings: Findings) -> dict[str, AnySet]:
    parts = dict(zip(("train", "test"), read_captions(spec)))
    for name, part in parts.items():
        images = _published_coco(part, 0)
        findings.count(f"{name} images", len(part), images)
        whole = len(part) == images
        findings.count(
            f"{name} captions", sum(map(len, part.captions)), _published_coco(part, 1) if whole else None
        )
    return parts


def _published_coco(part: AnySet, which: int) -> int | None:
    return COCO.get(part.paths[0].parent.name, (None, None))[which]


CHECKS: dict[str, Callable[[DataSpec, Findings], dict[str, AnySet]]] = {
    "imagenet": _imagenet,
    "ilsvrc": _ilsvrc,
    "tiny_imagenet": _tiny_imagenet,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "cub": _cub,
    "voc": _voc,
    "coco": _coco,
    "captions": _captions,
    "folder": _folder,
}


def _decode(parts: dict[str, AnySet], findings: Findings, sample: int | None) -> None:
    """Decode `sample` images spread over the parts, or all; every one that cannot be is a problem."""
    chosen: dict[Path, None] = {}
    for part in parts.values():
        if getattr(part, "pixels", None) is None:
            few = len(part) if sample is None else min(len(part), max(1, sample // len(parts)))
            for i in np.linspace(0, len(part) - 1, few).round().astype(int):
                chosen[part.paths[i]] = None
    if not chosen:
        return
    paths, sides, faults = list(chosen), [], 0
    with (
        ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool,
        progress(desc="reading images", total=len(paths), unit="img", delay=2) as bar,
    ):
        for start in range(0, len(paths), BLOCK):
            for result in pool.map(_sides, paths[start : start + BLOCK]):
                bar.update()
                if isinstance(result, str):
                    faults += 1
                    findings.say("PROBLEM", result)
                else:
                    sides.append(result)
    which = "every image" if sample is None else "a sample"
    if sides:
        low, high = np.min(sides, axis=0), np.max(sides, axis=0)
        read = f"{len(sides):,} of {len(paths):,} images decoded ({which})"
        findings.say("note" if faults else "ok", f"{read}, {low[0]} × {low[1]} to {high[0]} × {high[1]}")


def _sides(path: Path) -> tuple[int, int] | str:
    try:
        height, width = read_rgb(path).shape[:2]
    except UserError as error:
        return str(error)
    return width, height


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
