"""Readers, checks and decoding, through the same `open_*` the tasks call, on tiny data written here."""

import csv
import hashlib
import io
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from common.data import open_captions, open_classification, open_detection, open_localisation, parse_data
from common.data.check import check_images
from common.data.decode import Fit, centre_crop, decode_all, read_headers, read_rgb, resize, resize_short
from common.data.fingerprint import content_digest
from common.data.thumbnails import read_thumbnails, write_thumbnails
from common.data.voc import VOC_CLASSES
from common.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


def picture(path: Path, size=(20, 10), seed=0, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **save)
    return path


def fails(call, *parts: str) -> str:
    """The one-line message of the UserError that `call` raises; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# the spec


def test_parse_data():
    spec = parse_data("folder:/a/b,boxes=c.csv,exclude_boxed=1")
    assert (spec.kind, spec.path, spec.options) == (
        "folder",
        "/a/b",
        {"boxes": "c.csv", "exclude_boxed": "1"},
    )
    assert str(spec) == "folder:/a/b,boxes=c.csv,exclude_boxed=1" and parse_data(str(spec)) == spec
    assert parse_data("scenes").options == {} and parse_data("scenes:size=smoke").options == {"size": "smoke"}
    spec = parse_data("captions:images=~/x,train=A.json,val=B.json")
    assert spec.path is None and spec.options["images"] == str(Path.home() / "x")
    assert parse_data("voc:~/v").path == str(Path.home() / "v")
    assert parse_data("folder:/data/a=b,val=test").path == "/data/a=b"


@pytest.mark.parametrize(
    "text, parts",
    [
        ("imagenet:/x", ("'imagenet'", "folder:", "voc:", "captions:", "cub:", "scenes")),
        ("/data/x", ("is no kind", "folder:DIR")),
        ("folder:/x,boxs=a", ("'boxs'", "boxes, boxes_split, exclude_boxed")),
        ("captions:imges=/x", ("'imges'", "images")),
        ("folder:/x,boxes", ("'boxes' is not key=value",)),
        ("folder:/x,val=a,val=b", ("'val' is given twice",)),
        ("folder", ("no path",)),
        ("voc:year=2007", ("no path",)),
        ("scenes:/x", ("takes no path",)),
    ],
)
def test_parse_data_refuses(text, parts):
    fails(lambda: parse_data(text), text, *parts)


def test_open_refuses_the_wrong_kind():
    fails(lambda: open_detection("folder:/x"), "detection does not read 'folder'", "voc, coco, scenes")
    fails(lambda: open_captions("voc:/x"), "captions, scenes")


# image folders


@pytest.fixture
def imagefolder(tmp_path) -> Path:
    root = tmp_path / "pets"
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(root / part / name / f"{part}{i}.png", seed=100 * label + i + 10 * count)
    return root


def boxes_file(root: Path, rows, header="path,x0,y0,x1,y1") -> Path:
    path = root.parent / "boxes.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_folder(imagefolder, monkeypatch):
    (imagefolder / "train" / "cat" / "notes.txt").write_text("x")
    train, test = open_classification(f"folder:{imagefolder}")
    assert (train.name, train.classes, len(train), len(test)) == ("pets", ["cat", "dog"], 8, 4)
    assert train.labels.tolist() == [0] * 4 + [1] * 4 and train.labels.dtype == np.int64
    assert train.ids[4] == "train/dog/train0.png" and train.paths[4] == imagefolder / train.ids[4]
    assert train.report == ["1 × file that is no image: ignored (first: train/cat/notes.txt)"]
    assert train.fingerprint != test.fingerprint and train.boxes is None
    assert open_classification(f"folder:{imagefolder},name=my pets")[0].name == "my-pets"
    monkeypatch.chdir(imagefolder)
    here, _ = open_classification("folder:.")
    assert (here.name, here.ids, here.fingerprint) == ("pets", train.ids, train.fingerprint)


def test_folder_bad_layouts(imagefolder, tmp_path):
    def opened(path, **options):
        return lambda: open_classification(
            f"folder:{path}" + "".join(f",{k}={v}" for k, v in options.items())
        )

    fails(opened(tmp_path / "none"), str(tmp_path / "none"), "no such folder", "found: pets/", "DIR/train")
    (tmp_path / "empty").mkdir()
    fails(opened(tmp_path / "empty"), "empty", "expected DIR/train/<class>")
    fails(opened(picture(tmp_path / "a.png")), "is a file")
    fails(opened(imagefolder / "train"), "no train/ folder (found: cat/, dog/)")
    fails(opened(imagefolder, val="test"), "no test/ folder (found: train/, val/)", "val=")
    fails(opened(imagefolder, val="train"), "two folders below")
    fails(opened(imagefolder, val=imagefolder / "val"), "val=/", "two folders below")
    (imagefolder / "train" / "emu").mkdir()
    fails(opened(imagefolder), "train/emu", "class folder with no image (found: nothing)")
    (imagefolder / "train" / "emu").rmdir()
    picture(imagefolder / "val" / "yak" / "a.png")
    fails(opened(imagefolder), "val/yak", "class 'yak' is not among the 2 classes", "(cat, dog)")


@pytest.mark.parametrize(
    "spoil, fault",
    [
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
        (lambda path: path.write_text("not a picture"), "is not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "is cut short"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_bad_images(tmp_path, spoil, fault, suffix):
    root = tmp_path / "set"
    for part in ("train", "val"):
        for i in range(3):
            picture(root / part / "cat" / f"{i}.{suffix}", size=(64, 64), seed=i)
    spoil(root / "train" / "cat" / f"1.{suffix}")
    fails(lambda: open_classification(f"folder:{root}"), f"1.{suffix}", fault)
    if fault != "cannot be read":  # an absent file is a broken layout, not a bad image
        fails(lambda: open_classification(f"folder:{root}"), "1 of 3 images", "--skip-bad")
        train, test = open_classification(f"folder:{root}", skip_bad=True)
        assert train.ids == [f"train/cat/{i}.{suffix}" for i in (0, 2)] and len(test) == 3
        assert train.skipped == [f"train/cat/1.{suffix}"] and "1 × unreadable image" in train.report[-1]
        clean = train.take([0, 1])
        assert clean.skipped == train.skipped


def test_all_images_bad(imagefolder):
    for path in (imagefolder / "val").rglob("*.png"):
        path.write_bytes(b"x")
    fails(lambda: open_classification(f"folder:{imagefolder}", skip_bad=True), "none of the 4 images of pets")


def test_check_is_remembered_and_sees_changes(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.jpg", seed=i) for i in range(3)]
    assert check_images(paths) == []
    with monkeypatch.context() as patch:
        patch.setattr("common.data.check._fault", lambda path: pytest.fail("read again"))
        assert check_images(paths) == []
    paths[2].write_bytes(b"oops")
    fails(lambda: check_images(paths), str(paths[2]), "1 of 3")
    paths[0].unlink()
    assert check_images(paths, skip_bad=True) == [0, 2]
    assert check_images([]) == []


def test_check_takes_bytes_after_the_end(tmp_path):
    path = picture(tmp_path / "a.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    assert check_images([path]) == []


def test_limit(imagefolder):
    spec = f"folder:{imagefolder}"
    whole, test = open_classification(spec)
    few, few_test = open_classification(spec, limit=3)
    again, _ = open_classification(spec, limit=3)
    fewer, _ = open_classification(spec, limit=2)
    assert (
        len(few) == 3 and len(few_test) == 3 and few.ids == again.ids and few.fingerprint == again.fingerprint
    )
    assert set(fewer.ids) < set(few.ids) and few.ids == sorted(few.ids)
    assert len({whole.fingerprint, few.fingerprint, fewer.fingerprint}) == 3
    assert [whole.labels[whole.ids.index(i)] for i in few.ids] == few.labels.tolist()
    assert open_classification(spec, limit=99)[1].fingerprint == test.fingerprint
    # mixed: the first half of a sorted set is one class, of a shuffled one it is not (as long as SHA-256 is)
    order = sorted(range(8), key=lambda i: hashlib.sha256(whole.ids[i].encode()).digest())
    assert [whole.ids[i] for i in sorted(order[:3])] == few.ids
    fails(lambda: open_classification(spec, limit=0), "--limit 0")


def test_fingerprint_is_of_the_data_not_the_place(imagefolder, tmp_path):
    before = open_classification(f"folder:{imagefolder}")[0].fingerprint
    imagefolder.rename(tmp_path / "moved")
    assert open_classification(f"folder:{tmp_path / 'moved'}")[0].fingerprint == before
    picture(tmp_path / "moved" / "train" / "cat" / "train0.png", size=(30, 30))
    assert open_classification(f"folder:{tmp_path / 'moved'}")[0].fingerprint != before


def test_content_digest_reads_once(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = content_digest([path])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: pytest.fail("read again"))
        assert content_digest([path]) == first
    path.write_text("two!")
    assert content_digest([path]) != first


# boxes for localisation


def test_localisation_scores_the_boxed_images_of_val(imagefolder):
    rows = ["val/dog/val1.png,0,0.5,1,1", "val/dog/val1.png,0.25,0,0.5,0.5", "train/cat/train0.png,0,0,1,1"]
    listed = boxes_file(imagefolder, rows)
    train, test = open_localisation(f"folder:{imagefolder},boxes={listed}")
    assert len(train) == 8 and test.ids == ["val/dog/val1.png"] and test.labels.tolist() == [1]
    boxed = {key: boxes.tolist() for key, boxes in zip(train.ids, train.boxes) if len(boxes)}
    assert boxed == {"train/cat/train0.png": [[0, 0, 1, 1]]}  # a threshold may be chosen on them
    assert (
        test.boxes[0].tolist() == [[0, 0.5, 1, 1], [0.25, 0, 0.5, 0.5]] and test.boxes[0].dtype == np.float64
    )
    assert test.report == ["1 × boxed image of the training folder: not scored (first: train/cat/train0.png)"]
    before = test.fingerprint
    boxes_file(imagefolder, [rows[0], rows[1].replace("0.25", "0.26"), rows[2]])
    assert open_localisation(f"folder:{imagefolder},boxes={listed}")[1].fingerprint != before
    # classifying: all of val, unless told otherwise nothing is left out
    train, test = open_classification(f"folder:{imagefolder},boxes={listed}")
    assert (len(train), len(test)) == (8, 4)


def test_localisation_refuses_scoring_training_images(imagefolder):
    only_train = boxes_file(imagefolder, ["train/cat/train0.png,0,0,1,1"])
    spec = f"folder:{imagefolder},boxes={only_train}"
    message = fails(
        lambda: open_localisation(spec), "1 boxed images are training images too", "exclude_boxed=1"
    )
    assert "boxes_split=val" not in message  # would leave nothing
    train, test = open_localisation(spec + ",exclude_boxed=1")
    assert len(train) == 7 and test.ids == ["train/cat/train0.png"] and not set(train.ids) & set(test.ids)
    assert len(open_classification(spec + ",exclude_boxed=1")[0]) == 7

    both = boxes_file(imagefolder, ["train/cat/train0.png,0,0,1,1", "val/cat/val0.png,0,0,1,1"])
    spec = f"folder:{imagefolder},boxes={both}"
    fails(lambda: open_localisation(spec + ",boxes_split=all"), "boxes_split=val", "exclude_boxed=1")
    train, test = open_localisation(spec + ",exclude_boxed=1")
    assert len(train) == 7 and test.ids == ["train/cat/train0.png", "val/cat/val0.png"]
    assert open_localisation(spec + ",exclude_boxed=1,boxes_split=val")[1].ids == ["val/cat/val0.png"]


def test_localisation_refuses_copies(imagefolder):
    copy = imagefolder / "val" / "dog" / "train2.png"
    copy.write_bytes((imagefolder / "train" / "cat" / "train2.png").read_bytes())
    listed = boxes_file(imagefolder, ["val/dog/train2.png,0,0,1,1"])
    spec = f"folder:{imagefolder},boxes={listed}"
    fails(lambda: open_localisation(spec), str(copy), "is also the training image", "train/cat/train2.png")


@pytest.mark.parametrize(
    "rows, header, parts",
    [
        (
            ["val/cat/val0.png,0,0,1,1"],
            "file,x0,y0,x1,y1",
            ("line 1", "file,x0", "expected 'path,x0,y0,x1,y1'"),
        ),
        (["val/cat/val0.png,0,0,1,1", "val/cat/val1.png,0,0,one,1"], None, ("line 3", "x1 is 'one'")),
        (["val/cat/val0.png,0,0,nan,1"], None, ("line 2", "x1 is 'nan'")),
        (["val/cat/val0.png,0,0,1"], None, ("line 2", "4 fields")),
        (["val/cat/val0.png,0,0,120,80"], None, ("line 2", "x1 is 120", "shares")),
        (["val/cat/gone.png,0,0,1,1", "val/cat/val0.png,0,0,1,1"], None, ("1 of 2", "val/cat/gone.png")),
        ([], None, ("holds no box",)),
    ],
)
def test_bad_box_lists(imagefolder, rows, header, parts):
    listed = boxes_file(imagefolder, rows, header or "path,x0,y0,x1,y1")
    fails(lambda: open_localisation(f"folder:{imagefolder},boxes={listed}"), str(listed), *parts)


def test_box_list_rules(imagefolder):
    rows = ["val/cat/val0.png,-0.1,0,1,1.2", "val/cat/val0.png,.5,.2,.5,.9", "val/cat/val0.png,1.1,0,1.2,1"]
    _, test = open_localisation(f"folder:{imagefolder},boxes={boxes_file(imagefolder, rows)}")
    assert test.boxes[0].tolist() == [[0, 0, 1, 1]]
    assert test.report == [
        "1 × box reaches outside its image: clipped (first: boxes.csv line 2)",
        "1 × box with no area: dropped (first: boxes.csv line 3)",
        "1 × box wholly outside its image: dropped (first: boxes.csv line 4)",
    ]
    fails(lambda: open_localisation(f"folder:{imagefolder}"), "localisation needs boxes")
    fails(lambda: open_classification(f"folder:{imagefolder},exclude_boxed=1"), "need boxes=FILE")
    fails(lambda: open_localisation(f"folder:{imagefolder},boxes=/gone.csv"), "/gone.csv", "No such file")
    listed = boxes_file(imagefolder, ["val/cat/val0.png,0,0,1,1"])
    fails(
        lambda: open_localisation(f"folder:{imagefolder},boxes={listed},exclude_boxed=yes"),
        "exclude_boxed=yes",
    )
    fails(
        lambda: open_localisation(f"folder:{imagefolder},boxes={listed},boxes_split=tset"), "boxes_split=tset"
    )


# VOC


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
        "1 × box with xmin or ymin 0, where VOC counts from 1: clipped (first: a.xml object 1)",
        "1 × box reaches outside its image: clipped (first: a.xml object 2)",
    ]


def test_voc_image_size_rules(tmp_path):
    root = one_folder(tmp_path, xml([("cell", (1, 1, 30, 10), 0)], size=(40, 10)))
    (root / "Annotations" / "b.xml").write_text(xml([], size=None))
    train, _ = open_detection(f"voc:{root}")
    assert train.sizes.tolist() == [[20, 10], [20, 10]] and train.boxes[0].tolist() == [[0, 0, 20, 10]]
    assert train.boxes[1].shape == (0, 4) and train.labels[1].shape == (0,)
    assert train.report == [
        "1 × wrong size in the XML: the image's own taken (first: a.xml, 40 × 10 for 20 × 10)",
        "1 × XML without <size>: the image's own taken (first: b.xml)",
        "1 × box reaches outside its image: clipped (first: a.xml object 1)",
        "1 × image without objects: kept, all background (first: b.xml)",
    ]


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


def test_voc_skips_bad_images_with_their_boxes(tmp_path):
    root = one_folder(tmp_path)
    (root / "JPEGImages" / "a.jpg").write_bytes(b"")
    fails(lambda: open_detection(f"voc:{root}"), "a.jpg", "is empty", "1 of 2")
    train, _ = open_detection(f"voc:{root}", skip_bad=True)
    assert train.ids == ["b"] and len(train.boxes) == len(train.labels) == len(train.difficult) == 1
    assert train.skipped == ["a"] and train.report[-1].startswith("1 × unreadable image: left out")


# captions


def coco(images, captions) -> dict:
    return {
        "images": [{"id": key, "file_name": name} for key, name in images],
        "annotations": [
            {"id": i, "image_id": key, "caption": text} for i, (key, text) in enumerate(captions)
        ],
    }


@pytest.fixture
def caption_files(tmp_path):
    """Write captions and give the spec: `caption_files(train, val)`, values as `coco` makes them."""
    for i in range(4):
        picture(tmp_path / "photos" / "images" / f"{i}.jpg", seed=i)

    def write(train, val=None) -> str:
        val = val or coco([(9, "3.jpg")], [(9, "a dog .")])
        for name, content in (("a", train), ("b", val)):
            (tmp_path / f"{name}.json").write_text(
                content if isinstance(content, str) else json.dumps(content)
            )
        return f"captions:images={tmp_path}/photos/images,train={tmp_path}/a.json,val={tmp_path}/b.json"

    return write


def test_captions(caption_files):
    train = coco(
        [(5, "0.jpg"), (2, "1.jpg"), (3, "2.jpg")],
        [(2, "two"), (5, " a  cat\n"), (5, ""), (7, "x"), (2, "2")],
    )
    train["annotations"][1]["id"] = 0
    train, test = open_captions(caption_files(train))
    assert (train.name, train.ids, train.captions) == ("photos", [5, 2], [["a cat"], ["two", "2"]])
    assert [path.name for path in train.paths] == ["0.jpg", "1.jpg"] and test.captions == [["a dog ."]]
    assert train.report == [
        "1 × annotation id doubled: both kept (first: a.json annotations[1], id 0)",
        "1 × empty caption: dropped (first: a.json annotations[2])",
        "1 × annotation whose image is not listed: dropped (first: a.json annotations[3], image 7)",
        "1 × image without a caption: left out (first: 2.jpg)",
    ]
    assert open_captions(caption_files(coco([(9, "3.jpg")], [(9, "a dog .")])))[1].report == [
        "1 × image is in training and in the test set (first: 3.jpg)"
    ]


@pytest.mark.parametrize(
    "content, parts",
    [
        ("{", ("a.json", "not valid JSON")),
        ([], ("a.json", "no list 'images'", "list")),
        ({"images": [], "annotations": []}, ("a.json", "'images' is empty")),
        ({"images": [{"id": 1, "file_name": "0.jpg"}]}, ("no list 'annotations'", "keys images")),
        (coco([(1, "0.jpg")], []), ("'annotations' is empty",)),
        (coco([("1", "0.jpg")], [(1, "x")]), ("images[0]", "'id' is '1'", "integer")),
        ({"images": [{"id": 1, "name": "x"}], "annotations": [0]}, ("images[0]", "'file_name'", "id, name")),
        (
            {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 1, "text": "x"}]},
            ("'caption'",),
        ),
        (coco([(1, "0.jpg"), (1, "1.jpg")], [(1, "x")]), ("images[1]", "image id 1 is doubled", "0.jpg")),
        (
            coco([(1, "0.jpg")], [(2, "x"), (3, "y")]),
            ("all 2 annotations are of images that are not listed",),
        ),
        (coco([(1, "0.jpg")], [(1, " ")]), ("none of its 1 images has a caption",)),
        (coco([(1, "0.jpg"), (2, "n.jpg")], [(1, "x"), (2, "y")]), ("1 of 2 images", "n.jpg")),
    ],
)
def test_bad_captions(caption_files, content, parts):
    spec = caption_files(content)
    fails(lambda: open_captions(spec), *parts)


def test_captions_layouts(caption_files, tmp_path):
    spec = caption_files(coco([(1, "0.jpg")], [(1, "x")]))
    fails(lambda: open_captions(spec.replace("a.json", "gone.json")), "gone.json", "no such file")
    fails(lambda: open_captions(f"captions:images={tmp_path}"), "no train=FILE")
    fails(lambda: open_captions(f"captions:train={tmp_path}/a.json,val={tmp_path}/b.json"), "no images=DIR")
    for suffix in ("2014", ""):
        root = tmp_path / f"coco{suffix}"
        for part, name in (("train", "a"), ("val", "b")):
            for i in range(4):
                picture(root / f"{part}2014" / f"{i}.jpg", seed=i)
            (root / "annotations").mkdir(exist_ok=True)
            (root / "annotations" / f"captions_{part}{suffix}.json").write_bytes(
                (tmp_path / f"{name}.json").read_bytes()
            )
        train, test = open_captions(f"captions:{root}")
        assert train.name == root.name and train.paths[0].parent.name == "train2014" and test.ids == [9]
        assert test.paths == [root / "val2014" / "3.jpg"]
        # test= wins over val, and a name relative to the folder is found
        _, test = open_captions(
            f"captions:{root},test=annotations/captions_train{suffix}.json,images=train2014"
        )
        assert test.ids == [1]
    (root / "annotations" / "captions_val.json").unlink()
    fails(lambda: open_captions(f"captions:{root}"), "no captions_val*.json", "found: captions_train.json")


# CUB


@pytest.fixture
def cub(tmp_path) -> Path:
    root = tmp_path / "CUB_200_2011"
    names = ["001.Black_Bird/a b.jpg", "001.Black_Bird/c.jpg", "002.Owl/d.jpg", "002.Owl/e.jpg"]
    for i, name in enumerate(names):
        picture(root / "images" / name, seed=i)
    tables = {
        "classes": ["1 001.Black_Bird", "2 002.Owl"],
        "images": [f"{i} {name}" for i, name in enumerate(names, 1)],
        "image_class_labels": ["1 1", "2 1", "3 2", "4 2"],
        "train_test_split": ["1 1", "2 0", "3 1", "4 0"],
        "bounding_boxes": [
            "1 0.0 0.0 20.0 10.0",
            "2 5.0 2.0 10.0 4.0",
            "3 15.0 0.0 10.0 10.0",
            "4 30.0 1.0 5.0 5.0",
        ],
    }
    for name, lines in tables.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_cub(cub):
    train, test = open_localisation(f"cub:{cub}")
    assert (train.name, train.classes) == ("CUB_200_2011", ["Black_Bird", "Owl"])
    assert train.ids == ["001.Black_Bird/a b.jpg", "002.Owl/d.jpg"] and test.labels.tolist() == [0, 1]
    assert train.boxes[0].tolist() == [[0, 0, 1, 1]] and train.boxes[1].tolist() == [[0.75, 0, 1, 1]]
    assert test.boxes[0].tolist() == [[0.25, 0.2, 0.75, 0.6]] and test.boxes[1].shape == (0, 4)
    assert train.report == ["1 × box reaches outside its image: clipped (first: 002.Owl/d.jpg)"]
    assert test.report == ["1 × box with no area inside its image: dropped (first: 002.Owl/e.jpg)"]
    assert open_classification(f"cub:{cub.parent}")[0].ids == train.ids


@pytest.mark.parametrize(
    "table, old, new, parts",
    [
        ("images", "3 002.Owl/d.jpg", "3 002.Owl/x.jpg", ("1 of 4 images", "x.jpg")),
        ("images", "2 ", "1 ", ("images.txt line 2", "id 1 is doubled")),
        ("bounding_boxes", "4.0", "four", ("bounding_boxes.txt line 2", "expected an id and 4 float")),
        ("bounding_boxes", "2 5.0", "7 5.0", ("bounding_boxes.txt", "first: id 2")),
        ("image_class_labels", "1 1", "1 9", ("image_class_labels.txt", "class 9")),
        ("train_test_split", "1 1", "1 2", ("train_test_split.txt", "expected 0 or 1")),
    ],
)
def test_bad_cub(cub, table, old, new, parts):
    path = cub / f"{table}.txt"
    path.write_text(path.read_text().replace(old, new, 1))
    fails(lambda: open_localisation(f"cub:{cub}"), *parts)


def test_cub_wrong_layout(cub):
    (cub / "bounding_boxes.txt").unlink()
    fails(
        lambda: open_localisation(f"cub:{cub}"),
        "has no bounding_boxes.txt",
        "found: classes.txt",
        "expected images/",
    )


# the embedded world goes through the same readers


def test_scenes_resolve_to_the_readers(imagefolder, cub, tmp_path, monkeypatch, caption_files):
    import common.scenes

    asked = []

    class World:
        imagenet = imagefolder

    World.cub = cub
    World.vocdevkit = one_folder(tmp_path)
    monkeypatch.setattr(common.scenes, "ensure_world", lambda **kw: asked.append(kw) or World, raising=False)
    assert open_classification("scenes")[0].name == "scenes-tiny"
    assert open_localisation("scenes:size=smoke,seed=3")[1].name == "scenes-smoke-seed3"
    assert open_detection("scenes:name=x")[0].name == "x"
    assert asked == [{"size": "tiny", "seed": 0}, {"size": "smoke", "seed": 3}, {"size": "tiny", "seed": 0}]
    fails(lambda: open_detection("scenes:seed=one"), "seed=one")


# decoding


def test_read_rgb_modes(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 8, 3), np.uint8)
    grey16 = rng.integers(0, 65536, (6, 8), np.uint16)

    def saved(image: Image.Image, name: str) -> np.ndarray:
        image.save(tmp_path / name)
        array = read_rgb(tmp_path / name)
        assert array.shape == (6, 8, 3) and array.dtype == np.uint8
        return array

    np.testing.assert_array_equal(saved(Image.fromarray(rgb), "rgb.png"), rgb)
    grey = saved(Image.fromarray(rgb[:, :, 0]), "grey.png")
    np.testing.assert_array_equal(grey, np.repeat(rgb[:, :, :1], 3, 2))
    sixteen = saved(Image.fromarray(grey16), "16.png")
    np.testing.assert_array_equal(sixteen[:, :, 0], np.round(grey16 / 65535 * 255).astype(np.uint8))
    alpha = np.dstack([rgb, np.full((6, 8), 255, np.uint8)])
    alpha[0, :, 3], alpha[1, :, 3] = 0, 51
    layered = saved(Image.fromarray(alpha), "rgba.png")
    assert (layered[0] == 0).all() and (layered[2:] == rgb[2:]).all()
    np.testing.assert_allclose(layered[1], rgb[1] * 0.2, atol=1)
    palette = Image.fromarray(rgb).quantize(16)
    np.testing.assert_array_equal(saved(palette, "p.png"), np.array(palette.convert("RGB")))
    # Pillow writes CMYK JPEG inverted, as Adobe does; a plain colour comes back within compression error
    cmyk = saved(Image.new("RGB", (8, 6), (200, 30, 90)).convert("CMYK"), "cmyk.jpg")
    np.testing.assert_allclose(cmyk.reshape(-1, 3), [[200, 30, 90]] * 48, atol=6)
    assert (saved(Image.new("1", (8, 6), 1), "1.png") == 255).all()
    Image.fromarray(rng.random((6, 8)).astype(np.float32)).save(tmp_path / "f.tiff")
    fails(lambda: read_rgb(tmp_path / "f.tiff"), "f.tiff", "floating-point")
    fails(lambda: read_rgb(tmp_path / "gone.png"), "gone.png")
    (tmp_path / "text.jpg").write_text("hello")
    fails(lambda: read_rgb(tmp_path / "text.jpg"), "text.jpg", "not a readable image")


# where a bright top left pixel of the stored image goes, by EXIF orientation (EXIF 2.3, tag 0x0112)
CORNER = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_exif_rotation_and_the_frame_of_boxes(tmp_path, orientation, suffix):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    upright = read_rgb(path)
    assert upright.shape == ((32, 16, 3) if orientation >= 5 else (16, 32, 3))
    assert upright[CORNER[orientation]].min() > 200 and (upright > 128).sum() == 8 * 8 * 3
    assert read_headers([path]).tolist() == [[32, 16, orientation]]
    stored = read_rgb(path, frame=(32, 16))
    assert stored.shape == (16, 32, 3) and stored[0, 0].min() > 200
    if orientation >= 5:
        np.testing.assert_array_equal(read_rgb(path, frame=np.array([16, 32])), upright)
    fails(lambda: read_rgb(path, frame=(31, 16)), "is 32 × 16", "31 × 16")


@pytest.mark.parametrize("said, frame", [((20, 10), [20, 10]), ((10, 20), [10, 20]), ((50, 50), [20, 10])])
def test_detection_reads_rotated_images_as_their_boxes_were_drawn(tmp_path, said, frame):
    root = one_folder(tmp_path, xml([("cell", (1, 1, 5, 20), 0)], size=said))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(root / "JPEGImages" / "a.jpg", exif=exif)
    train, _ = open_detection(f"voc:{root}")
    assert train.sizes[0].tolist() == frame and train.boxes[0].tolist() == [[0, 0, 5, frame[1]]]
    assert read_rgb(train.paths[0], frame=train.sizes[0]).shape == (frame[1], frame[0], 3)


def test_resize_backends_agree_with_their_oracles():
    from torchvision.transforms import functional

    image = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    pil = Image.fromarray(image)
    np.testing.assert_array_equal(resize(image, (20, 11)), np.asarray(functional.resize(pil, [11, 20])))
    for side in (16, 24, 60):
        shorter = functional.resize(pil, side)
        np.testing.assert_array_equal(resize_short(image, side), np.asarray(shorter))
        tall = resize_short(image.transpose(1, 0, 2), side)
        assert tall.shape[:2] == shorter.size
    cropped = np.asarray(functional.center_crop(pil, [22, 30]))
    np.testing.assert_array_equal(centre_crop(image, (30, 22)), cropped)
    area = cv2.resize(image, (20, 11), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(resize(image, (20, 11), "cv2_area"), area)
    linear = cv2.resize(image, (80, 90), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize(image, (80, 90), "cv2_area"), linear)
    np.testing.assert_array_equal(resize(image, (80, 90), "cv2_linear"), linear)
    assert resize(image, (53, 37)) is image
    fails(lambda: resize(image, (5, 5), "lanczos"), "lanczos", "pil, cv2_area, cv2_linear")


def test_decode_all(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.png", size=(20 + i, 30), seed=i) for i in range(5)]
    fit = Fit(16, 12)
    array = decode_all(paths, fit, workers=2)
    assert array.shape == (5, 12, 16, 3) and array.dtype == np.uint8 and isinstance(array, np.memmap)
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(array[i], resize(read_rgb(path), (16, 12)))
    with monkeypatch.context() as patch:
        patch.setattr("common.data.decode.read_rgb", lambda path: pytest.fail("decoded again"))
        np.testing.assert_array_equal(decode_all(paths, fit), array)
    crop = Fit(16, 16, short=20, backend="cv2_area")
    assert (fit.name, crop.name) == ("squash-16x12-pil", "short20-centre-16x16-cv2_area")
    expected = centre_crop(resize_short(read_rgb(paths[0]), 20, "cv2_area"), (16, 16))
    np.testing.assert_array_equal(decode_all(paths, crop)[0], expected)
    picture(paths[0], size=(40, 40), seed=9)
    assert not np.array_equal(decode_all(paths, fit)[0], array[0])


def test_decode_all_leaves_nothing_half_written(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", size=(40, 40), seed=i) for i in range(3)]
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])
    fails(lambda: decode_all(paths, Fit(8, 8)), "2.png")
    decoded = tmp_path / "cache" / "decoded"
    assert not list(decoded.glob("*.npy")) and not list(decoded.glob(".*.tmp"))
    paths[2].write_bytes(whole)
    assert decode_all(paths, Fit(8, 8)).shape == (3, 8, 8, 3)


def test_unwritable_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(picture(tmp_path / "file.png")))
    fails(lambda: check_images([tmp_path / "file.png"]), "file.png", "BACKBENCH_CACHE")


def test_thumbnails(tmp_path):
    paths = [picture(tmp_path / f"{i}.jpg", size=(300 + i, 100), seed=i) for i in range(6)]
    ids = [f"img{i}" for i in range(6)]
    target = write_thumbnails(tmp_path / "a", ids, paths, count=4, side=150)
    content = target.read_bytes()
    assert write_thumbnails(tmp_path / "b", ids, paths, count=4, side=150).read_bytes() == content
    thumbs = read_thumbnails(target)
    assert list(thumbs) == sorted(sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())[:4])
    for key, (jpeg, size, scale) in thumbs.items():
        image = Image.open(io.BytesIO(jpeg))
        assert size == (300 + int(key[3:]), 100) and max(image.size) == 150
        assert scale == pytest.approx((image.width / size[0], image.height / size[1]))
    os.utime(target, (1, 1))
    write_thumbnails(tmp_path / "a", ids[:2], paths[:2])
    assert target.read_bytes() == content and target.stat().st_mtime == 1
    assert len(read_thumbnails(write_thumbnails(tmp_path / "c", ids, paths))) == 6


def test_readers_import_no_torch():
    import subprocess
    import sys

    code = "import common.data, sys; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_box_list_equals_a_plain_reading(imagefolder):
    """The reader against the csv module read naively, on many random boxes."""
    rng = np.random.default_rng(3)
    ids = ["val/cat/val0.png", "val/cat/val1.png", "val/dog/val0.png"]
    rows = []
    for _ in range(50):
        (x0, x1), (y0, y1) = np.sort(rng.random((2, 2)).round(4), axis=1)
        rows.append(f"{ids[rng.integers(3)]},{x0},{y0},{x1},{y1}")
    listed = boxes_file(imagefolder, rows)
    _, test = open_localisation(f"folder:{imagefolder},boxes={listed}")
    with listed.open() as file:
        plain = [
            (row["path"], [float(row[k]) for k in ("x0", "y0", "x1", "y1")]) for row in csv.DictReader(file)
        ]
    for key, boxes in zip(test.ids, test.boxes):
        assert boxes.tolist() == [box for path, box in plain if path == key]
    assert sum(map(len, test.boxes)) == 50
