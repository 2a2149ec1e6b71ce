"""Caption sets: any JSON in COCO's caption format, or a Karpathy split file, beside a folder of images."""

from pathlib import Path
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json
from backbench.common.data.fingerprint import fingerprint
from backbench.common.data.layout import (
    Report,
    json_field,
    json_id,
    json_lists,
    need_folder,
    need_present,
    short_name,
    whole_text,
)
from backbench.common.data.overlap import note_of_both
from backbench.common.data.readers.coco_layout import PLAIN_NAMES, CocoLayout
from backbench.common.data.registry import DataSpec
from backbench.common.data.types import CaptionSet

LAYOUT = (
    "train2014/, val2014/ (or one images/) and annotations/captions_train2014.json, captions_val2014.json"
)
SUFFIXES = ("2014", "2017", "")
KARPATHY = ("train", "restval", "val", "test")  # his splits


def read_captions(spec: DataSpec) -> tuple[CaptionSet, CaptionSet]:
    """Read captions as (train, test): in COCO's format, or by a Karpathy split file.

    `captions:images=DIR,train=A.json,val=B.json`: `images=` is one folder for both, `train_images=`, `val_images=`,
    `test_images=` are one each; the test set is `test=` where given, else `val=`. `captions:DIR` finds the files by
    COCO's names, those of 2014 before those of 2017; `year=2017` asks for the latter.
    `captions:DIR,karpathy=dataset_coco.json` trains on the file's train and restval images and tests on its test
    images; `test=val` on its val images. The images lie in DIR or DIR/images, or in `images=`.
    """
    root = need_folder(spec.path, LAYOUT) if spec.path else None
    if "karpathy" in spec.options:
        return note_of_both(*_read_karpathy(spec, root))
    tested = "test" if "test" in spec.options else "val"
    layout = CocoLayout(spec, root, "captions", SUFFIXES, LAYOUT)
    files = {part: layout.annotation_file(part) for part in ("train", tested)}
    folders = {part: layout.image_folder(part, files[part]) for part in files}
    name = _set_name(spec, root or folders["train"])
    return note_of_both(*(_read(name, files[part], folders[part]) for part in files))


def _set_name(spec: DataSpec, folder: Path) -> str:
    folder = folder.resolve()
    if not spec.path and folder.name in PLAIN_NAMES:
        folder = folder.parent
    year = spec.options.get("year", "")
    default = folder.name + (f"-{year}" if year else "") + ("-karpathy" if "karpathy" in spec.options else "")
    return short_name(spec.options.get("name", default))


def _read(name: str, file: Path, folder: Path) -> CaptionSet:
    report = Report()
    images, annotations = json_lists(
        read_json(file), ("images", "annotations"), file, "COCO's caption format"
    )
    names = _image_names(images, file)
    captions = _sentences(annotations, names, file, report)
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
    doubled = []
    for number, image in enumerate(images):
        where = f"{file}: images[{number}]"
        key = json_field(image, "id", int, where)
        file_name = json_field(image, "file_name", str, where)
        if key in names:
            doubled.append(f"{where}: image id {key} is doubled ({names[key]} and {file_name})")
        names.setdefault(key, file_name)
    if doubled:
        raise UserError(doubled[0] + (f"; {len(doubled)} ids are" if len(doubled) > 1 else ""))
    return names


def _sentences(
    annotations: list[Any], names: dict[int, str], file: Path, report: Report
) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {key: [] for key in names}
    seen: set[int] = set()
    for number, annotation in enumerate(annotations):
        where = f"{file}: annotations[{number}]"
        owner = json_field(annotation, "image_id", int, where)
        sentence = _sentence(annotation, "caption", file, f"annotations[{number}]", report)
        place = f"{file.name} annotations[{number}]"
        key = json_id(annotation.get("id"))
        if key is not None and key in seen:
            report.note("annotation id doubled: both kept", f"{place}, id {key}")
        seen.add(key)
        if owner not in captions:
            report.note("annotation whose image is not listed: dropped", f"{place}, image {owner}")
        elif not sentence:
            report.note("empty caption: dropped", place)
        else:
            captions[owner].append(sentence)
    if not any(captions.values()) and not {json_id(a["image_id"]) for a in annotations} & set(names):
        raise UserError(f"{file}: all {len(annotations)} annotations are of images that are not listed there")
    return captions


def _sentence(item: Any, key: str, file: Path, place: str, report: Report) -> str:
    """The text `key` on one line, with U+FFFD for halves of surrogate pairs, which is noted."""
    text = item.get(key) if isinstance(item, dict) else None
    if isinstance(text, str) and whole_text(text) != text:
        report.note("caption with half a surrogate pair: U+FFFD in its place", f"{file.name} {place}")
        item = {key: whole_text(text)}
    return " ".join(json_field(item, key, str, f"{file}: {place}").split())


def _read_karpathy(spec: DataSpec, root: Path | None) -> list[CaptionSet]:
    """The two sets of a Karpathy split file (Karpathy & Fei-Fei, CVPR 2015), as dataset_coco.json."""
    file = Path(spec.options["karpathy"])
    file = root / file if root and not file.exists() else file
    for key in ("train", "val", "year"):
        if key in spec.options:
            raise UserError(f"--data {spec}: {key}= does not go with karpathy=, which says what is what")
    tested = spec.options.get("test", "test")
    if tested not in ("test", "val"):
        raise UserError(f"--data {spec}: test={tested}; with karpathy= it is test or val")
    folder = Path(spec.options["images"]) if "images" in spec.options else root
    if folder is None:
        raise UserError(f"--data {spec}: no images=DIR; where are the images of {file}?")
    folder = root / folder if root and not folder.exists() else folder
    need_folder(folder, f"the images of {file}")
    content = read_json(file)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise UserError(f"{file}: has no list 'images'; expected a Karpathy split file (dataset_coco.json)")
    if (
        "images" not in spec.options and (folder / "images").is_dir()
    ):  # Flickr's, which the file names no folder of
        named = {str(image.get("filepath", "")) for image in images if isinstance(image, dict)}
        if not any(name and (folder / name).is_dir() for name in named):
            folder = folder / "images"
    parts = {"train": ("train", "restval"), tested: (tested,)}
    name = _set_name(spec, root or folder)
    return [_karpathy_part(name, file, folder, images, splits) for splits in parts.values()]


def _karpathy_part(
    name: str, file: Path, folder: Path, images: list[Any], splits: tuple[str, ...]
) -> CaptionSet:
    report = Report()
    captions: dict[int, list[str]] = {}
    paths: dict[int, Path] = {}
    for number, image in enumerate(images):
        where = f"{file}: images[{number}]"
        split = json_field(image, "split", str, where)
        if split not in KARPATHY:
            raise UserError(f"{where}: split is {split!r}; expected {', '.join(KARPATHY)}")
        if split not in splits:
            continue
        key = json_field(image, "cocoid" if "cocoid" in image else "imgid", int, where)
        if key in paths:
            raise UserError(f"{where}: image id {key} is doubled")
        inside = Path(
            json_field({"filepath": "", **image}, "filepath", str, where),
            json_field(image, "filename", str, where),
        )
        paths[key] = folder / (inside if (folder / inside.parent).is_dir() else inside.name)
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            raise UserError(f"{where}: 'sentences' is no list; expected a Karpathy split file")
        texts = [_sentence(s, "raw", file, f"images[{number}] sentence", report) for s in sentences]
        captions[key] = [text for text in texts if text]
        if len(captions[key]) < len(texts):
            place = f"{file.name} images[{number}]"
            report.note("empty caption: dropped", place, len(texts) - len(captions[key]))
        if not captions[key]:
            report.note("image without a caption: left out", inside.name)
            del captions[key]
    ids = list(captions)
    if not ids:
        raise UserError(f"{file}: no image with a caption has split {' or '.join(splits)}")
    chosen = [paths[key] for key in ids]
    need_present(file, "images", chosen)
    key = fingerprint(["captions", *splits], ids, chosen, [file])
    return CaptionSet(name, ids, chosen, [captions[i] for i in ids], key, report.lines())
