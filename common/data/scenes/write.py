"""Writing the rendered world to disk in the layouts of ImageNet, VOC, COCO captions and CUB-200-2011."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from backbench.common.base.errors import UserError
from backbench.common.data.scenes.compose import group, portrait
from backbench.common.data.scenes.draw import Scene, Seen
from backbench.common.data.scenes.grammar import describe
from backbench.common.data.scenes.shapes import CLASSES

# images of each split, and pixels: the side, for VOC the width of a 4:3 picture
SIZES: dict[str, dict[str, dict[str, int]]] = {
    "smoke": {
        "imagenet": {"train": 80, "val": 40, "pixels": 48},
        "voc": {"2007_trainval": 16, "2007_test": 12, "2012_trainval": 12, "pixels": 160},
        "captions": {"train": 24, "val": 12, "pixels": 96},
        "cub": {"train": 32, "test": 24, "pixels": 80},
    },
    "tiny": {
        "imagenet": {"train": 4000, "val": 600, "pixels": 64},
        "voc": {"2007_trainval": 300, "2007_test": 250, "2012_trainval": 300, "pixels": 320},
        "captions": {"train": 1200, "val": 250, "pixels": 160},
        "cub": {"train": 1000, "test": 400, "pixels": 144},
    },
}
# the split's number in the random stream of each image: never renumber
STREAMS = {
    name: number
    for number, name in enumerate(
        ("imagenet_train", "imagenet_val", "voc_2007_trainval", "voc_2007_test", "voc_2012_trainval",
         "captions_train", "captions_val", "cub_train", "cub_test")
    )
}  # fmt: skip
ASPECTS = ((1.0, 0.75), (0.75, 1.0), (0.94, 0.94), (1.06, 0.8))  # of VOC pictures: width, height
Draw = Callable[[Callable[[int], Any], int], Iterator[Any]]


def image_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """The generator of one image, the same whatever is drawn before it. `stream` is one of STREAMS."""
    return np.random.default_rng(np.random.SeedSequence([seed, STREAMS[stream], index]))


def portrait_scene(seed: int, stream: str, index: int, side: int) -> tuple[Scene, np.ndarray, Seen]:
    """Image `index` of an imagenet or cub stream; its class is `index` modulo the number of classes."""
    scene, picture, seen = portrait(image_generator(seed, stream, index), CLASSES[index % len(CLASSES)], side)
    return scene, picture, seen[0]


def voc_scene(seed: int, stream: str, index: int, width: int) -> tuple[Scene, np.ndarray, list[Seen]]:
    """Image `index` of a voc stream, 4:3, 3:4 or square; `width` is the width of a 4:3 one."""
    rng = image_generator(seed, stream, index)
    shares = ASPECTS[int(rng.integers(len(ASPECTS)))]
    return group(rng, *(round(width * share) for share in shares), keep=0.25, tiny=0.06)


def caption_scene(
    seed: int, stream: str, index: int, side: int
) -> tuple[Scene, np.ndarray, list[Seen], list[str]]:
    """Image `index` of a captions stream with its five sentences."""
    rng = image_generator(seed, stream, index)
    scene, picture, seen = group(rng, side, side, keep=0.6)
    return scene, picture, seen, describe(scene, seen, rng)


def write_world(root: Path, size: str, seed: int, bar: Any) -> None:
    """Render everything below `root`, an empty folder. `bar.update()` is called after each image."""
    counts = SIZES[size]

    def draw(work: Callable[[int], Any], count: int) -> Iterator[Any]:
        for index in range(count):
            yield work(index)
            bar.update()

    _write_imagenet(root / "imagenet", counts["imagenet"], seed, draw)
    _write_voc(root / "VOCdevkit", counts["voc"], seed, draw)
    _write_captions(root / "coco", counts["captions"], seed, draw)
    _write_cub(root / "CUB_200_2011", counts["cub"], seed, draw)


def image_count(size: str) -> int:
    """How many images a world of this size has. Raises UserError for an unknown size."""
    if size not in SIZES:
        raise UserError(f"scenes size '{size}' is unknown; one of {', '.join(SIZES)}")
    return sum(n for part in SIZES[size].values() for name, n in part.items() if name != "pixels")


def _save(path: Path, picture: np.ndarray) -> None:
    done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    if not done:
        raise RuntimeError(f"{path}: cv2 could not encode a {picture.shape} picture")
    path.write_bytes(data)


def _write_imagenet(root: Path, counts: dict[str, int], seed: int, draw: Draw) -> None:
    rows = []
    side = counts["pixels"]
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)

        def one(index: int, split: str = split) -> tuple:
            scene, picture, seen = portrait_scene(seed, f"imagenet_{split}", index, side)
            kind = scene.things[0].kind
            path = f"{split}/{kind}/{kind}_{index:05d}.jpg"
            _save(root / path, picture)
            return (path, *(f"{x / side:.6g}" for x in seen.box))

        rows += draw(one, counts[split])
    with (root.parent / "imagenet_boxes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("path", "x0", "y0", "x1", "y1"), *rows])


def difficult(scene: Scene, seen: Seen) -> bool:
    """VOC's flag: more than half of what is inside the picture is hidden, or it is very small."""
    x0, y0, x1, y1 = seen.box
    return seen.visible < 0.5 * seen.inside or max(x1 - x0, y1 - y0) < 0.125 * min(scene.width, scene.height)


def _write_voc(root: Path, counts: dict[str, int], seed: int, draw: Draw) -> None:
    for year in ("2007", "2012"):
        folder = root / f"VOC{year}"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        lists: dict[str, list[str]] = {}
        first = 1
        for split in ("trainval", "test")[: 2 if year == "2007" else 1]:
            stream = f"{year}_{split}"
            names = [
                f"{n:06d}" if year == "2007" else f"2012_{n:06d}"
                for n in range(first, first + counts[stream])
            ]
            first += len(names)

            def one(
                index: int, stream: str = stream, names: list[str] = names, folder: Path = folder
            ) -> None:
                scene, picture, seen = voc_scene(seed, f"voc_{stream}", index, counts["pixels"])
                _save(folder / "JPEGImages" / f"{names[index]}.jpg", picture)
                (folder / "Annotations" / f"{names[index]}.xml").write_text(
                    _voc_xml(names[index], folder.name, scene, seen), encoding="utf-8"
                )

            list(draw(one, len(names)))
            lists[split] = names
        lists["train"], lists["val"] = lists["trainval"][::2], lists["trainval"][1::2]
        for split, names in lists.items():
            (folder / "ImageSets/Main" / f"{split}.txt").write_text(
                "".join(f"{name}\n" for name in names), encoding="utf-8"
            )


def _voc_xml(name: str, folder: str, scene: Scene, seen: list[Seen]) -> str:
    objects = []
    for thing, one in zip(scene.things, seen, strict=True):
        x0, y0, x1, y1 = one.box  # 0-based, half-open; VOC counts from 1 and includes the last pixel
        objects.append(
            f"\t<object>\n\t\t<name>{thing.kind}</name>\n\t\t<pose>Unspecified</pose>\n"
            f"\t\t<truncated>{one.truncated:d}</truncated>\n"
            f"\t\t<difficult>{difficult(scene, one):d}</difficult>\n"
            f"\t\t<bndbox>\n\t\t\t<xmin>{x0 + 1}</xmin>\n\t\t\t<ymin>{y0 + 1}</ymin>\n"
            f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        )
    return (
        f"<annotation>\n\t<folder>{folder}</folder>\n\t<filename>{name}.jpg</filename>\n"
        "\t<source>\n\t\t<database>rendered scenes</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{scene.width}</width>\n\t\t<height>{scene.height}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{''.join(objects)}</annotation>\n"
    )


def _write_captions(root: Path, counts: dict[str, int], seed: int, draw: Draw) -> None:
    (root / "annotations").mkdir(parents=True)
    side, first = counts["pixels"], 1
    for split in ("train", "val"):
        folder = root / f"{split}2014"
        folder.mkdir()
        ids = range(first, first + counts[split])
        names = [f"COCO_{split}2014_{number:012d}.jpg" for number in ids]

        def one(index: int, split: str = split, names: list[str] = names, folder: Path = folder) -> list[str]:
            _, picture, _, sentences = caption_scene(seed, f"captions_{split}", index, side)
            _save(folder / names[index], picture)
            return sentences

        sentences = list(draw(one, len(ids)))
        content = {
            "info": {"description": "rendered scenes", "version": "1.0"},
            "licenses": [],
            "images": [
                {"id": i, "file_name": name, "width": side, "height": side} for i, name in zip(ids, names)
            ],
            "annotations": [
                {"image_id": i, "id": 5 * i + k, "caption": text}
                for i, five in zip(ids, sentences)
                for k, text in enumerate(five)
            ],
        }
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        first += len(ids)


def _write_cub(root: Path, counts: dict[str, int], seed: int, draw: Draw) -> None:
    folders = [f"{number:03d}.{name}" for number, name in enumerate(CLASSES, 1)]
    for folder in folders:
        (root / "images" / folder).mkdir(parents=True)
    rows = []
    for split in ("train", "test"):

        def one(index: int, split: str = split) -> tuple[int, str, int, str]:
            scene, picture, seen = portrait_scene(seed, f"cub_{split}", index, counts["pixels"])
            label = CLASSES.index(scene.things[0].kind)
            path = f"{folders[label]}/{CLASSES[label]}_{split}_{index:04d}.jpg"
            _save(root / "images" / path, picture)
            x0, y0, x1, y1 = seen.box
            return label, path, int(split == "train"), f"{x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}"

        rows += draw(one, counts[split])
    rows.sort()  # as in the real set: by class, training and test images mixed
    columns = {
        "classes.txt": folders,
        "images.txt": [path for _, path, _, _ in rows],
        "image_class_labels.txt": [label + 1 for label, _, _, _ in rows],
        "train_test_split.txt": [train for _, _, train, _ in rows],
        "bounding_boxes.txt": [box for _, _, _, box in rows],
    }
    for name, values in columns.items():
        (root / name).write_text(
            "".join(f"{number} {value}\n" for number, value in enumerate(values, 1)), encoding="utf-8"
        )
