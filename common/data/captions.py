"""Caption sets: any JSON in COCO's caption format, beside a folder of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data.fingerprint import fingerprint
from common.data.layout import Report, found, need_folder, need_present, short_name
from common.data.spec import DataSpec
from common.data.types import CaptionSet
from common.errors import UserError
from common.files import read_json

LAYOUT = (
    "train2014/, val2014/ (or one images/) and annotations/captions_train2014.json, captions_val2014.json"
)
SUFFIXES = ("2014", "2017", "")
PLAIN_NAMES = ("images", "train", "val", "train2014", "val2014", "train2017", "val2017", "JPEGImages")


def read_captions(spec: DataSpec) -> tuple[CaptionSet, CaptionSet]:
    """Read `captions:images=DIR,train=A.json,val=B.json` or `captions:DIR` in COCO's layout as (train, test).

    `images=` is one folder for both, `train_images=`, `val_images=`, `test_images=` are one each. The test
    set is `test=` where given, else `val=`; below a DIR the files are found by COCO's names.
    """
    root = need_folder(spec.path, LAYOUT) if spec.path else None
    tested = "test" if "test" in spec.options else "val"
    files = {part: _annotation_file(spec, root, part) for part in ("train", tested)}
    folders = {part: _image_folder(spec, root, part, files[part]) for part in files}
    default = root.resolve() if root else folders["train"].resolve()
    if not root and default.name in PLAIN_NAMES:
        default = default.parent
    name = short_name(spec.options.get("name", default.name))
    train, test = (_read(name, files[part], folders[part]) for part in files)
    both = set(train.paths) & set(test.paths)
    if both:
        line = f"{len(both)} × image is in training and in the test set (first: {min(both).name})"
        test = replace(test, report=[*test.report, line])
    return train, test


def _annotation_file(spec: DataSpec, root: Path | None, part: str) -> Path:
    if part in spec.options:
        path = Path(spec.options[part])
        return root / path if root and not path.exists() else path
    if root is None:
        raise UserError(f"--data {spec}: no {part}=FILE; write captions:images=DIR,train=A.json,val=B.json")
    for suffix in SUFFIXES:
        path = root / "annotations" / f"captions_{part}{suffix}.json"
        if path.is_file():
            return path
    within = root / "annotations" if (root / "annotations").is_dir() else root
    raise UserError(f"{within}: has no captions_{part}*.json ({found(within)}); expected {LAYOUT}")


def _image_folder(spec: DataSpec, root: Path | None, part: str, file: Path) -> Path:
    expected = f"the images of {file}"
    for key in (f"{part}_images", "images"):
        if key in spec.options:
            path = Path(spec.options[key])
            return need_folder(root / path if root and not path.exists() else path, expected)
    if root is None:
        raise UserError(f"--data {spec}: no images=DIR (or {part}_images=DIR); where are {expected}?")
    suffix = file.stem.removeprefix(f"captions_{part}")
    for name in (f"{part}{suffix}", *(f"{part}{year}" for year in SUFFIXES), "images"):
        if (root / name).is_dir():
            return need_folder(root / name, expected)
    raise UserError(f"{root}: no folder with {expected} ({found(root)}); expected {LAYOUT}, or give images=")


def _read(name: str, file: Path, folder: Path) -> CaptionSet:
    report = Report()
    content = read_json(file)
    for key in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            has = (
                f"keys {', '.join(map(str, content))}"
                if isinstance(content, dict)
                else type(content).__name__
            )
            raise UserError(f"{file}: has no list '{key}' (found {has}); expected COCO's caption format")
        if not content[key]:
            raise UserError(f"{file}: the list '{key}' is empty")
    names = _image_names(content["images"], file)
    captions = _sentences(content["annotations"], names, file, report)
    bare = [key for key, sentences in captions.items() if not sentences]
    if bare:
        report.note("image without a caption: left out", names[bare[0]], len(bare))
    ids = [key for key, sentences in captions.items() if sentences]
    if not ids:
        raise UserError(f"{file}: none of its {len(names)} images has a caption")
    paths = [folder / names[key] for key in ids]
    need_present(file, "images", paths)
    key = fingerprint(["captions"], ids, paths, [file])
    return CaptionSet(name, ids, paths, [captions[i] for i in ids], key, report.lines())


def _image_names(images: list[Any], file: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for number, image in enumerate(images):
        where = f"{file}: images[{number}]"
        key = _field(image, "id", int, where)
        file_name = _field(image, "file_name", str, where)
        if key in names:
            raise UserError(f"{where}: image id {key} is doubled ({names[key]} and {file_name})")
        names[key] = file_name
    return names


def _sentences(
    annotations: list[Any], names: dict[int, str], file: Path, report: Report
) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {key: [] for key in names}
    seen: set[int] = set()
    for number, annotation in enumerate(annotations):
        where = f"{file}: annotations[{number}]"
        owner = _field(annotation, "image_id", int, where)
        sentence = " ".join(_field(annotation, "caption", str, where).split())
        place = f"{file.name} annotations[{number}]"
        key = annotation.get("id")
        if key is not None and key in seen:
            report.note("annotation id doubled: both kept", f"{place}, id {key}")
        seen.add(key)
        if owner not in captions:
            report.note("annotation whose image is not listed: dropped", f"{place}, image {owner}")
        elif not sentence:
            report.note("empty caption: dropped", place)
        else:
            captions[owner].append(sentence)
    if not any(captions.values()) and not {a["image_id"] for a in annotations} & set(names):
        raise UserError(f"{file}: all {len(annotations)} annotations are of images that are not listed there")
    return captions


def _field(item: Any, key: str, kind: type, where: str) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        keys = f"keys {', '.join(map(str, item))}" if isinstance(item, dict) else type(item).__name__
        has = f"{value!r}" if value is not None else f"missing, found {keys}"
        raise UserError(f"{where}: '{key}' is {has}; expected {'an integer' if kind is int else 'text'}")
    return value
