"""VOC's folders: years, boxes and the rules for flawed ones, sizes, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from conftest import fails, picture
from PIL import Image

from backbench.common.data import open_detection
from backbench.common.data.decode import read_rgb
from backbench.common.data.readers.voc import VOC_CLASSES


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


def xml(objects, size=(20, 10), root="annotation") -> str:
    dims = "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    items = ""
    for name, corners, *difficult in objects:
        box = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
        hard = f"<difficult>{difficult[0]}</difficult>" if difficult else ""
        # a part has a box of its own, which is not the object's
        part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        items += f"<object><name>{name}</name>{hard}<bndbox>{box}</bndbox>{part}</object>"
    return f"<{root}>{dims}{items}</{root}>"


def voc_year(root: Path, splits: dict[str, dict[str, str]]) -> Path:
    """A folder in VOC's layout: {split: {image: xml}}, every image 20 × 10."""
    for split, images in splits.items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
        for i, (name, text) in enumerate(images.items()):
            picture(root / "JPEGImages" / f"{name}.jpg", seed=i)
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


FINE = xml([("cell", (1, 1, 20, 10), 0)])


def one_folder(tmp_path, text: str = FINE) -> Path:
    return voc_year(tmp_path / "cells", {"trainval": {"a": text, "b": FINE}, "test": {"c": FINE}})


def test_voc_boxes_and_classes(tmp_path):
    text = xml([("worm", (3, 2, 7, 9), 1), ("cell", (1, 1, 20, 10), 0)])
    train, test = open_detection(f"voc:{one_folder(tmp_path, text)}")
    assert (train.name, train.classes, train.ids, test.ids) == ("cells", ["cell", "worm"], ["a", "b"], ["c"])
    # 1-based inclusive 3…7 covers pixels 2…6, which is 2 to 7 half-open; the whole image is 0, 0, w, h
    assert train.boxes[0].tolist() == [[2, 1, 7, 9], [0, 0, 20, 10]] and train.boxes[0].dtype == np.float32
    assert train.labels[0].tolist() == [1, 0] and train.difficult[0].tolist() == [True, False]
    assert train.labels[0].dtype == np.int64 and train.difficult[0].dtype == bool
    assert train.sizes.tolist() == [[20, 10], [20, 10]] and train.report == [] and test.report == []
    assert open_detection(f"voc:{one_folder(tmp_path, text)},classes=worm+cell")[0].labels[0].tolist() == [
        0,
        1,
    ]


def test_voc_years(tmp_path):
    cat = xml([("cat", (1, 1, 5, 5), 0)])
    devkit = tmp_path / "VOCdevkit"
    voc_year(devkit / "VOC2007", {"trainval": {"000001": cat}, "test": {"000002": cat, "000003": cat}})
    voc_year(devkit / "VOC2012", {"trainval": {"2008_1": cat, "2008_2": cat}})
    for text in (f"voc:{devkit}", f"voc:{tmp_path}", f"voc:{devkit},year=2007+2012"):
        train, test = open_detection(text)
        assert train.ids == ["000001", "2008_1", "2008_2"] and test.ids == ["000002", "000003"]
        assert train.classes == VOC_CLASSES and train.name == "voc0712" and train.labels[0].tolist() == [7]
    train, test = open_detection(f"voc:{devkit},year=2007")
    assert (len(train), len(test), train.name) == (1, 2, "voc2007")
    fails(lambda: open_detection(f"voc:{devkit},year=2012"), "no such split 'test'", "has: trainval", "test=")
    fails(lambda: open_detection(f"voc:{devkit},year=2010"), "no VOC2010/", "found: VOC2007/, VOC2012/")
    _, same = open_detection(f"voc:{devkit},year=2012,test=trainval")
    assert same.report == ["2 × image is in training and in the test set (first: 2008_1.jpg)"]
    # equal names in two years stay two images
    voc_year(devkit / "VOC2012", {"trainval": {"000001": cat}})
    assert open_detection(f"voc:{devkit}")[0].ids == ["000001", "VOC2012/000001"]


def test_voc_box_rules(tmp_path):
    text = xml(
        [
            ("cell", (0, 0, 5, 5)),
            ("cell", (15, 5, 25, 12), 0),
            ("cell", (30, 1, 40, 5), 0),
            ("cell", (9, 3, 4, 8), 0),
            ("cell", (4, 3, 4, 8), 0),
            ("worm", (2.5, 3, 4, 8), 1),
        ]
    )
    train, _ = open_detection(f"voc:{one_folder(tmp_path, text)}")
    assert train.boxes[0].tolist() == [[0, 0, 5, 5], [14, 4, 20, 10], [1.5, 2, 4, 8]]
    assert train.labels[0].tolist() == [0, 0, 1] and train.difficult[0].tolist() == [False, False, True]
    assert train.report == [
        "1 × object without <difficult>: taken as not difficult (first: a.xml object 1)",
        "1 × box with xmin > xmax or ymin > ymax: dropped (first: a.xml object 4)",
        "1 × box with no area (xmin = xmax or ymin = ymax): dropped (first: a.xml object 5)",
        "1 × box wholly outside its image: dropped (first: a.xml object 3)",
        "1 × box with xmin or ymin below 1, from which VOC counts: clipped (first: a.xml object 1)",
        "1 × box reaches outside its image: clipped (first: a.xml object 2)",
    ]


def test_truth_is_as_published(tmp_path):
    """Rules for flawed boxes are for training: what is scored keeps every object, as the devkit reads it."""
    corners = [(0, 0, 9, 9), (5, 5, 5, 14), (15, 5, 25, 12), (9, 3, 4, 8), (2, 3, 4, 8), (30, 1, 40, 5)]
    odd = (
        xml([("cell", box, k == 4) for k, box in enumerate(corners)])
        .replace("True", "1")
        .replace("False", "0")
    )
    root = voc_year(tmp_path / "cells", {"trainval": {"a": odd, "b": FINE}, "test": {"c": FINE, "d": odd}})
    train, test = open_detection(f"voc:{root}")
    known = test.truth[1]
    assert known.boxes.tolist() == [[x0 - 1, y0 - 1, x1, y1] for x0, y0, x1, y1 in corners]
    assert known.boxes.dtype == np.float64 and known.areas is None
    assert known.repaired.tolist() == [True, True, True, True, False, True]
    assert known.difficult.tolist() == [False] * 4 + [True, False] and known.labels.tolist() == [0] * 6
    assert len(test.boxes[1]) == 3 == len(train.boxes[0])
    assert test.report[-1] == "5 × object that rules for boxes clip or drop: scored as published"
    assert not any("published" in line for line in train.report)
    assert test.take([1]).truth[0].boxes.tolist() == known.boxes.tolist()
    held_out = train.take([0, 0]).split(0.5)[1]  # --val-share scores a part of the training images
    assert held_out.report[-1] == test.report[-1]
    assert train.fingerprint == train.to_score().fingerprint  # the data are the same, however they are scored


def test_voc_image_size_rules(tmp_path):
    root = one_folder(tmp_path, xml([("cell", (1, 1, 30, 10), 0)], size=(25, 10)))
    (root / "Annotations" / "b.xml").write_text(xml([], size=None))
    train, _ = open_detection(f"voc:{root}")
    assert train.sizes.tolist() == [[20, 10], [20, 10]] and train.boxes[0].tolist() == [[0, 0, 20, 10]]
    assert train.boxes[1].shape == (0, 4) and train.labels[1].shape == (0,)
    assert train.report == [
        "1 × XML without <size>: the image's own taken (first: b.xml)",
        "1 × wrong size in the XML: the image's own taken (first: a.xml, 25 × 10 for 20 × 10)",
        "1 × box reaches outside its image: clipped (first: a.xml object 1)",
        "1 × image without objects: kept, all background (first: b.xml)",
    ]
    assert train.problems == train.report[1:2]


@pytest.mark.parametrize(
    "said, corners, share",
    [
        ((40, 20), (3, 1, 20, 10), [1, 0, 10, 5]),  # one ratio on both sides: refused whatever the boxes are
        ((60, 10), (31, 1, 60, 10), [10, 0, 20, 10]),  # squeezed: the box fits the XML's size alone
    ],
)
def test_boxes_for_another_size_of_the_image(tmp_path, said, corners, share):
    root = one_folder(tmp_path, xml([("cell", corners, 0)], size=said))
    message = (f"a.jpg: is 20 × 10, and a.xml has boxes for {said[0]} × {said[1]}; if", "rescale=1", "1 of 2")
    fails(lambda: open_detection(f"voc:{root}"), *message)
    train, test = open_detection(f"voc:{root},rescale=1")
    assert train.boxes[0].tolist() == [share] == train.truth[0].boxes.tolist()
    assert train.boxes[1].tolist() == [[0, 0, 20, 10]] and test.report == train.problems == []
    assert train.report == [
        "1 × boxes for another size in the XML: rescaled to the image's "
        f"(first: a.xml, {said[0]} × {said[1]} for 20 × 10)"
    ]
    fails(lambda: open_detection(f"voc:{root},rescale=yes"), "rescale=yes", "1 or 0")


def test_sizes_that_are_no_other_scale(tmp_path):
    """Off by a pixel, sides changed about, or no box to be wrong: said, and read as the image is."""
    root = one_folder(tmp_path)
    for said, problem in (((21, 9), False), ((10, 20), True), ((0, 0), False)):
        (root / "Annotations" / "a.xml").write_text(xml([("cell", (1, 1, 9, 10), 0)], size=said))
        for spec in (f"voc:{root}", f"voc:{root},rescale=1"):
            train, _ = open_detection(spec)
            assert train.boxes[0].tolist() == [[0, 0, 9, 10]] and len(train.report) == 1
            assert bool(train.problems) == problem
    (root / "Annotations" / "a.xml").write_text(xml([("cell", (1, 1, 9, 15), 0)], size=(10, 20)))
    fails(lambda: open_detection(f"voc:{root}"), "boxes for 10 × 20; turn the image, or correct the size")
    (root / "Annotations" / "a.xml").write_text(xml([], size=(40, 20)))
    assert len(open_detection(f"voc:{root}")[0].report) == 2


@pytest.mark.parametrize(
    "text, parts",
    [
        ("<annotation>\n<object></annotation>", ("a.xml line 2", "malformed XML")),
        ("", ("a.xml line 1", "malformed XML")),
        (xml([], root="html"), ("a.xml", "<html>", "expected <annotation>")),
        (FINE.replace("<name>cell</name>", ""), ("a.xml: object 1 has no <name>",)),
        (FINE.replace("bndbox", "box"), ("a.xml: object 1 (cell) has no <bndbox>",)),
        (FINE.replace("<xmax>20</xmax>", ""), ("a.xml: object 1 (cell) has no <xmax>",)),
        (FINE.replace("<xmax>20", "<xmax>wide"), ("a.xml: object 1 (cell): <xmax> is 'wide'",)),
        (FINE.replace("<width>20</width>", ""), ("a.xml: <size> has no <width>",)),
        (FINE.replace("<difficult>0", "<difficult>maybe"), ("a.xml", "<difficult> is 'maybe'")),
    ],
)
def test_voc_bad_xml(tmp_path, text, parts):
    fails(lambda: open_detection(f"voc:{one_folder(tmp_path, text)}"), *parts)


def test_voc_bad_layouts(tmp_path):
    root = one_folder(tmp_path)
    fails(lambda: open_detection(f"voc:{root},classes=worm"), "a.xml", "object 1", "class 'cell'", "['worm']")
    fails(lambda: open_detection(f"voc:{root},classes=cell+cell"), "doubled")
    fails(lambda: open_detection(f"voc:{root},train=trian"), "'trian'", "has: test, trainval")
    fails(lambda: open_detection(f"voc:{root},year=2007"), "year= is for a VOCdevkit")
    fails(lambda: open_detection(f"voc:{root / 'JPEGImages'}"), "found: a.jpg, b.jpg, c.jpg", "JPEGImages/")
    (root / "ImageSets" / "Main" / "test.txt").write_text("\nc 1\nc -1\n")
    assert open_detection(f"voc:{root}")[1].report == [
        "1 × image listed twice: taken once (first: test.txt line 3)"
    ]
    (root / "ImageSets" / "Main" / "test.txt").write_text("\n")
    fails(lambda: open_detection(f"voc:{root}"), "test.txt", "lists no image")
    (root / "ImageSets" / "Main" / "test.txt").write_text("c\nd\ne\n")
    fails(lambda: open_detection(f"voc:{root}"), "test.txt", "2 of 3 images", "d.jpg")
    picture(root / "JPEGImages" / "d.png"), picture(root / "JPEGImages" / "e.JPEG")
    fails(lambda: open_detection(f"voc:{root}"), "test.txt", "2 of 3 annotations", "d.xml")
    for name in "abc":
        (root / "Annotations" / f"{name}.xml").write_text(xml([]))
    (root / "ImageSets" / "Main" / "test.txt").write_text("c\n")
    fails(lambda: open_detection(f"voc:{root}"), "no annotation holds an object")


def test_voc_names_with_spaces_and_folders(tmp_path):
    root = one_folder(tmp_path)
    names = ["my cat 1", "my cat", "part/d", "part/deep e"]
    for name, ending in zip(names, ("jpg", "png", "PNG", "tif")):
        picture(root / "JPEGImages" / f"{name}.{ending}")
        (root / "Annotations" / f"{name}.xml").parent.mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text(FINE)
    (root / "ImageSets" / "Main" / "test.txt").write_text("my cat 1\nmy cat  -1\npart/d\t1\npart/deep e\n")
    test = open_detection(f"voc:{root}")[1]
    assert test.ids == names and [path.suffix for path in test.paths] == [".jpg", ".png", ".PNG", ".tif"]
    picture(root / "JPEGImages" / "my cat.jpg")
    assert open_detection(f"voc:{root}")[1].report == [
        "1 × image in several files: the first taken (first: my cat.jpg)"
    ]
    (root / "ImageSets" / "Main" / "test.txt").write_text("my dog\n")  # no image of its first word
    fails(lambda: open_detection(f"voc:{root}"), "1 of 1 images", "my dog.jpg")


def test_voc_skips_bad_images_with_their_boxes(tmp_path):
    root = one_folder(tmp_path)
    (root / "JPEGImages" / "a.jpg").write_bytes(b"")
    fails(lambda: open_detection(f"voc:{root}"), "a.jpg", "is empty", "1 of 2")
    train, _ = open_detection(f"voc:{root}", skip_bad=True)
    assert train.ids == ["b"] and len(train.boxes) == len(train.labels) == len(train.difficult) == 1
    assert train.skipped == ["a"] and train.report[-1].startswith("1 × unreadable image: left out")


@pytest.mark.parametrize("said, frame", [((20, 10), [20, 10]), ((10, 20), [10, 20]), ((18, 15), [20, 10])])
def test_detection_reads_rotated_images_as_their_boxes_were_drawn(tmp_path, said, frame):
    root = one_folder(tmp_path, xml([("cell", (1, 1, 5, 20), 0)], size=said))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "JPEGImages" / "a.jpg", exif=exif)
    train, _ = open_detection(f"voc:{root}")
    assert train.sizes[0].tolist() == frame and train.boxes[0].tolist() == [[0, 0, 5, frame[1]]]
    assert read_rgb(train.paths[0], frame=train.sizes[0]).shape == (frame[1], frame[0], 3)
