"""Readers, checks and decoding, through the same `open_*` the tasks call, on tiny data written here."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import fails, picture
from test_voc import one_folder

from backbench.common.data import (
    open_captions,
    open_classification,
    open_detection,
    open_localisation,
    parse_data,
)
from backbench.common.data.check import check_images
from backbench.common.data.fingerprint import content_digest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


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


def test_names_with_commas_and_equal_signs_are_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b", "val=1", "one, two=2,ünï", "own,name=x"):
        (tmp_path / name).mkdir()
    (tmp_path / "a=b" / "c,d.csv").touch()
    assert parse_data("folder:a=b").path == "a=b" and parse_data("folder:val=1").path == "val=1"
    spec = parse_data("folder:one, two=2,ünï,val=test,name=x")
    assert (spec.path, spec.options) == ("one, two=2,ünï", {"val": "test", "name": "x"})
    spec = parse_data("folder:a=b,boxes=c,d.csv,boxes_split=val")  # a file in the folder
    assert (spec.path, spec.options) == ("a=b", {"boxes": "c,d.csv", "boxes_split": "val"})
    assert parse_data("folder:own,name=x").path == "own,name=x"
    fails(lambda: parse_data("folder:b=a"), "'b' is no option of folder, and nothing is called 'b=a'")
    fails(lambda: parse_data("coco:images=a=b,x"), "'x' is not key=value")
    assert (
        parse_data("voc:V,classes=" + "+".join(f"class{i}" for i in range(99))).options["classes"][:6]
        == "class0"
    )
    fails(lambda: parse_data("folder:~nobody-of-this-name/x"), "there is no such user")


def test_data_is_named_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "b.csv").touch()
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert str(parse_data("folder:x,boxes=b.csv,val=train").absolute()) == (
        f"folder:{tmp_path}/x,boxes={tmp_path}/b.csv,val=train"
    )
    assert str(parse_data("captions:karpathy=b.csv,test=train").absolute()) == (
        f"captions:karpathy={tmp_path}/b.csv,test=train"
    )
    assert str(parse_data("voc:x,train=train").absolute()) == f"voc:{tmp_path}/x,train=train"
    assert str(parse_data("scenes").absolute()) == "scenes"


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
        patch.setattr("backbench.common.data.check._fault", lambda path: pytest.fail("read again"))
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
    assert test.report == [
        "1 × boxed image of the training folder: not scored (first: train/cat/train0.png)",
        "3 × image of val without a box: not scored (first: val/cat/val0.png)",
    ]
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
        (["val/cat/val0.png,.5,.5,.5,1"], None, ("holds no box",)),
        (["val/cat/val0.png,.8,0,.2,1"], None, ("line 2", "x0 0.8 is above x1 0.2: swapped corners")),
        (["val/cat/val0.png,0,.8,1,.2"], None, ("line 2", "y0 0.8 is above y1 0.2: swapped corners")),
    ],
)
def test_bad_box_lists(imagefolder, rows, header, parts):
    listed = boxes_file(imagefolder, rows, header or "path,x0,y0,x1,y1")
    fails(lambda: open_localisation(f"folder:{imagefolder},boxes={listed}"), str(listed), *parts)


def test_box_list_rules(imagefolder):
    rows = ["val/cat/val0.png,-0.1,0,1,1.2", "val/cat/val0.png,.5,.2,.5,.9", "val/cat/val0.png,1.1,0,1.2,1"]
    _, test = open_localisation(f"folder:{imagefolder},boxes={boxes_file(imagefolder, rows)}")
    assert test.boxes[0].tolist() == [[0, 0, 1, 1]]
    assert test.report[:3] == [
        "1 × box reaches outside its image: clipped (first: boxes.csv line 2)",
        "1 × box with no area: dropped (first: boxes.csv line 3)",
        "1 × box wholly outside its image: dropped (first: boxes.csv line 4)",
    ]
    assert test.problems == test.report[1:3]
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


def test_an_image_whose_boxes_are_all_dropped_is_a_miss(imagefolder):
    rows = ["val/cat/val0.png,0,0,1,1", "val/cat/val1.png,.5,.2,.5,.9"]
    _, test = open_localisation(f"folder:{imagefolder},boxes={boxes_file(imagefolder, rows)}")
    assert test.ids == ["val/cat/val0.png", "val/cat/val1.png"] and [len(b) for b in test.boxes] == [1, 0]
    line = "1 × image of which every box was dropped: a miss where it is scored (first: val/cat/val1.png)"
    assert line in test.report and line in test.problems


def test_a_part_held_out_tells_nothing_twice(imagefolder):
    (imagefolder / "train" / "cat" / "train1.png").write_bytes(b"x")
    train, _ = open_classification(f"folder:{imagefolder}", skip_bad=True)
    rest, scored = train.split(0.5)
    assert len(rest) + len(scored) == 7 and rest.skipped == ["train/cat/train1.png"] and scored.skipped == []
    assert len(rest.report) == 1 and scored.report == []


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
    assert (
        test.report
        == test.problems
        == [
            "1 × box with no area inside its image: dropped (first: 002.Owl/e.jpg)",
            "1 × image of which every box was dropped: a miss where it is scored (first: 002.Owl/e.jpg)",
        ]
    )
    assert open_classification(f"cub:{cub.parent}")[0].ids == train.ids


def test_a_cub_box_of_negative_width_is_a_miss(cub):
    path = cub / "bounding_boxes.txt"
    path.write_text(path.read_text().replace("2 5.0 2.0 10.0", "2 5.0 2.0 -4.0"))
    _, test = open_localisation(f"cub:{cub}")
    assert (
        len(test) == 2
        and "1 × box with swapped corners: dropped (first: 001.Black_Bird/c.jpg)" in test.problems
    )


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
    import backbench.common.data.scenes

    asked = []

    class World:
        imagenet = imagefolder

    World.cub = cub
    World.vocdevkit = one_folder(tmp_path)
    monkeypatch.setattr(
        backbench.common.data.scenes, "ensure_world", lambda **kw: asked.append(kw) or World, raising=False
    )
    assert open_classification("scenes")[0].name == "scenes-tiny"
    assert open_localisation("scenes:size=smoke,seed=3")[1].name == "scenes-smoke-seed3"
    assert open_detection("scenes:name=x")[0].name == "x"
    assert asked == [{"size": "tiny", "seed": 0}, {"size": "smoke", "seed": 3}, {"size": "tiny", "seed": 0}]
    fails(lambda: open_detection("scenes:seed=one"), "seed=one")


def test_readers_import_no_torch():
    import subprocess
    import sys

    code = "import backbench.common.data, sys; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
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
