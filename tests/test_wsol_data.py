"""ILSVRC, Tiny-ImageNet and CUB with their boxes: published layouts, published figures, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbench.common.base.errors import UserError
from backbench.common.data import open_classification, open_localisation

WNIDS = ("n01440764", "n01443537")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))


def picture(path: Path, size: tuple[int, int] = (40, 20), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    return path


def xml(wnid: str, *boxes: tuple[int, int, int, int]) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        f"<object><name>{wnid}</name><bndbox>"
        + "".join(f"<{n}>{v}</{n}>" for n, v in zip(names, box))
        + "</bndbox></object>"
        for box in boxes
    )
    return f"<annotation><filename>x</filename>{objects}</annotation>"


def ilsvrc(root: Path, nested: bool) -> Path:
    """Two classes, two training images each; three validation images of 40 × 20: a, b (two boxes), c."""
    for wnid in WNIDS:
        for number in range(2):
            picture(root / "train" / wnid / f"{wnid}_{number}.JPEG")
    for name, wnid in zip("abc", (WNIDS[0], WNIDS[1], WNIDS[1])):
        picture(root / "val" / (wnid if nested else "") / f"ILSVRC2012_val_{name}.JPEG")
    return root


BOXES = {"a": [(4, 2, 20, 10)], "b": [(0, 0, 40, 20), (10, 5, 30, 15)], "c": [(8, 4, 50, 30)]}
SHARES = {"a": [[0.1, 0.1, 0.5, 0.5]], "b": [[0, 0, 1, 1], [0.25, 0.25, 0.75, 0.75]], "c": [[0.2, 0.2, 1, 1]]}


def write_xml(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, wnid in zip("abc", (WNIDS[0], WNIDS[1], WNIDS[1])):
        (folder / f"ILSVRC2012_val_{name}.xml").write_text(xml(wnid, *BOXES[name]))
    return folder


def write_solution(path: Path) -> Path:
    lines = ["ImageId,PredictionString"]
    for name, wnid in zip("cab", (WNIDS[1], WNIDS[0], WNIDS[1])):
        text = " ".join(f"{wnid} {' '.join(map(str, box))}" for box in BOXES[name])
        lines.append(f"ILSVRC2012_val_{name},{text} ")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_localization(path: Path) -> Path:
    rows = [
        f"val/ILSVRC2012_val_{name}.JPEG,{','.join(map(str, box))}"
        for name, boxes in BOXES.items()
        for box in boxes
    ]
    path.write_text("\n".join(rows) + "\n")
    labels = [f"val/ILSVRC2012_val_{name}.JPEG,{label}" for name, label in zip("abc", (0, 1, 1))]
    path.with_name("class_labels.txt").write_text("\n".join(labels) + "\n")
    return path


SOURCES = {
    "xml": lambda root: write_xml(root / "Annotations" / "CLS-LOC" / "val"),
    "solution": lambda root: write_solution(root / "LOC_val_solution.csv"),
    "localization": lambda root: write_localization(root / "localization.txt"),
}


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "folders"])
@pytest.mark.parametrize("source", list(SOURCES))
def test_ilsvrc_says_the_same_from_every_source(tmp_path, source, nested):
    root = ilsvrc(tmp_path / "data", nested)
    made = SOURCES[source](root)
    named = "" if source != "localization" else f",boxes={made.name}"  # the others lie where Kaggle puts them
    train, test = open_localisation(f"ilsvrc:{root}{named}")
    assert train.classes == test.classes == list(WNIDS) and train.labels.tolist() == [0, 0, 1, 1]
    assert [path.stem[-1] for path in test.paths] == ["a", "b", "c"] and test.labels.tolist() == [0, 1, 1]
    for name, boxes in zip("abc", test.boxes):
        np.testing.assert_allclose(boxes, SHARES[name])
    assert test.report == [f"1 × box reaches outside its image: clipped (first: {test.ids[2]})"]
    assert open_classification(f"ilsvrc:{root}{named}")[1].labels.tolist() == [0, 1, 1]


def test_ilsvrc_below_kaggles_folders_and_with_training_boxes(tmp_path):
    root = ilsvrc(tmp_path / "k" / "ILSVRC" / "Data" / "CLS-LOC", nested=False)
    write_solution(tmp_path / "k" / "LOC_val_solution.csv")
    boxes = tmp_path / "k" / "LOC_train_solution.csv"
    boxes.write_text(f"ImageId,PredictionString\n{WNIDS[0]}_1,{WNIDS[0]} 0 0 20 20\n")
    train, test = open_localisation(f"ilsvrc:{tmp_path / 'k'},train_boxes={boxes.name}")
    assert [len(b) for b in train.boxes] == [0, 1, 0, 0] and len(test) == 3
    np.testing.assert_allclose(train.boxes[1], [[0, 0, 0.5, 1]])
    assert test.paths[0].parent == root / "val"


def test_ilsvrc_images_the_list_does_not_know(tmp_path):
    root = ilsvrc(tmp_path, nested=True)
    picture(root / "val" / WNIDS[0] / "ILSVRC2012_val_d.JPEG")
    write_solution(root / "LOC_val_solution.csv")
    with (root / "LOC_val_solution.csv").open("a") as file:
        file.write(f"ILSVRC2012_val_z,{WNIDS[0]} 0 0 1 1\n")
    _, test = open_localisation(f"ilsvrc:{root}")
    assert len(test) == 3 and any("without a box: not scored" in line for line in test.report)
    assert any("not there: ignored" in line for line in test.report)
    assert len(open_classification(f"ilsvrc:{root}")[1]) == 4


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "folders"])
def test_an_ilsvrc_image_whose_box_is_dropped_is_a_miss(tmp_path, nested):
    root = ilsvrc(tmp_path, nested)
    listed = write_solution(root / "LOC_val_solution.csv")
    listed.write_text(listed.read_text().replace("4 2 20 10", "20 2 4 10").replace("8 4 50 30", "8 4 8 30"))
    _, test = open_localisation(f"ilsvrc:{root}")
    assert [len(boxes) for boxes in test.boxes] == [0, 2, 0]
    assert (
        test.report
        == test.problems
        == [
            f"1 × box with swapped corners: dropped (first: {test.ids[0]})",
            f"1 × box with no area inside its image: dropped (first: {test.ids[2]})",
            f"2 × image of which every box was dropped: a miss where it is scored (first: {test.ids[0]})",
        ]
    )


def test_ilsvrc_refusals(tmp_path):
    root = ilsvrc(tmp_path, nested=False)
    with pytest.raises(UserError, match="boxes are needed; add boxes="):
        open_localisation(f"ilsvrc:{root}")
    listed = root / "LOC_val_solution.csv"
    for text, match in (
        ("ImageId,PredictionString\nILSVRC2012_val_a,n01 1 2 3\n", "line 2: .* groups of wnid"),
        ("ImageId,PredictionString\nILSVRC2012_val_a,n01 1 2 x 4\n", "line 2: a box is four numbers"),
        (
            "ImageId,PredictionString\nILSVRC2012_val_a,n99 1 2 3 4\n",
            "of class n99, which train/ does not have",
        ),
        ("a,b\n", "line 1: 'a,b' is none of"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=match):
            open_localisation(f"ilsvrc:{root}")
    with pytest.raises(UserError, match="no such file or folder; boxes= is"):
        open_localisation(f"ilsvrc:{root},boxes=absent")


def test_an_image_in_training_and_scoring_is_refused(tmp_path):
    root = ilsvrc(tmp_path, nested=False)
    write_solution(root / "LOC_val_solution.csv")
    copy = root / "train" / WNIDS[1] / "ILSVRC2012_val_b.JPEG"
    copy.write_bytes((root / "val" / copy.name).read_bytes())
    with pytest.raises(UserError, match="is to be scored and is also the training image"):
        open_localisation(f"ilsvrc:{root}")


def tiny_imagenet(folder: Path) -> Path:
    """Two classes, two training images each; three validation images."""
    root = folder / "tiny-imagenet-200"
    for wnid in WNIDS:
        for number in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", (64, 64))
        rows = [f"{wnid}_0.JPEG\t0\t0\t63\t63", f"{wnid}_1.JPEG\t16\t8\t47\t39"]
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("\n".join(rows) + "\n")
    for number in range(3):
        picture(root / "val" / "images" / f"val_{number}.JPEG", (64, 64))
    rows = [f"val_{n}.JPEG\t{WNIDS[n % 2]}\t0\t32\t44\t62" for n in range(3)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def tiny(tmp_path):
    return tiny_imagenet(tmp_path)


def test_tiny_imagenet(tiny):
    train, test = open_localisation(f"tiny_imagenet:{tiny}")
    assert train.classes == list(WNIDS) and train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1, 0] and test.name == "tiny-imagenet-200"
    np.testing.assert_allclose(train.boxes[0], [[0, 0, 1, 1]])
    np.testing.assert_allclose(train.boxes[1], [[0.25, 0.125, 0.75, 0.625]])
    np.testing.assert_allclose(test.boxes[0] * 64, [[0, 32, 45, 63]])
    assert open_classification(f"tiny_imagenet:{tiny}")[1].labels.tolist() == [0, 1, 0]


def test_tiny_imagenet_refusals(tiny):
    annotations = tiny / "val" / "val_annotations.txt"
    good = annotations.read_text()
    for text, match in (
        (good.replace("\t44", "\tx", 1), "line 1: .* an image, its class and x0 y0 x1 y1"),
        (good.replace(WNIDS[1], "n99"), "of class 'n99', which train/ does not have"),
        ("\n".join(good.splitlines()[:2]), "no line for val_2.JPEG"),
    ):
        annotations.write_text(text)
        with pytest.raises(UserError, match=match):
            open_localisation(f"tiny_imagenet:{tiny}")
    annotations.unlink()
    with pytest.raises(UserError, match="is not Tiny-ImageNet"):
        open_localisation(f"tiny_imagenet:{tiny}")


def test_the_first_cub_test_box(tmp_path):
    """Published: (60, 27, 385, 331) in 500 × 335."""
    names = ["001.Black_footed_Albatross/one.jpg", "001.Black_footed_Albatross/two.jpg"]
    for name in names:
        picture(tmp_path / "images" / name, (500, 335))
    tables = {
        "classes": ["1 001.Black_footed_Albatross"],
        "images": [f"{k} {name}" for k, name in enumerate(names, 1)],
        "image_class_labels": ["1 1", "2 1"],
        "train_test_split": ["1 0", "2 1"],
        "bounding_boxes": ["1 60.0 27.0 325.0 304.0", "2 139.0 30.0 153.0 264.0"],
    }
    for name, lines in tables.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    _, test = open_localisation(f"cub:{tmp_path},name=cub")
    np.testing.assert_allclose(test.boxes[0] * (500, 335, 500, 335), [[60, 27, 385, 331]])
