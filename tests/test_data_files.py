"""Which files are data: hidden and system files, links in circles, odd names; through the readers users call."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import fails, picture
from test_wsol_data import WNIDS, ilsvrc, tiny_imagenet, write_xml

from backbench.common.data import open_classification, open_localisation
from backbench.common.data.pictures import find_pictures
from backbench.common.grid.facts import _tree
from backbench.detection.results import image_index, read_voc_results
from backbench.pretrain.outliers import open_outliers
from backbench.wsol.evaluate import mask_files

FOLDERS = (".ipynb_checkpoints", ".thumbs", "@eaDir", "__MACOSX", "$RECYCLE.BIN")
FILES = ("._a.jpg", ".hidden.jpg", "Thumbs.db", ".DS_Store", "desktop.ini")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


def litter(folder: Path) -> int:
    """Hidden and system folders, each with a readable picture, and such files; how many they are."""
    for name in FOLDERS:
        picture(folder / name / "copy.jpg")
    for name in FILES:
        picture(folder / name, format="JPEG")
    return len(FOLDERS) + len(FILES)


def write_folder(root: Path, classes=("cat", "dog"), count: int = 2) -> Path:
    for part in ("train", "val"):
        for name in classes:
            for i in range(count):
                picture(root / part / name / f"{part}{i}.jpg", seed=i + len(name + part))
    return root


def ignored(images) -> int:
    """How many hidden and system entries a set's report counts."""
    line = next((line for line in images.report if "hidden or system" in line), "0 ")
    return int(line.split()[0])


def test_class_folders(tmp_path):
    root = write_folder(tmp_path / "set")
    clean = open_classification(f"folder:{root}")
    count = litter(root / "train") + litter(root / "train" / "cat")
    litter(root / "val" / "dog")
    train, test = open_classification(f"folder:{root}")
    assert train.classes == ["cat", "dog"] and (train.ids, test.ids) == (clean[0].ids, clean[1].ids)
    assert [part.fingerprint for part in (train, test)] == [part.fingerprint for part in clean]
    assert (ignored(train), ignored(test)) == (count, len(FOLDERS) + len(FILES))
    assert "first: train/$RECYCLE.BIN" in train.report[0]
    shutil.rmtree(root / "train" / "dog")
    (root / "train" / "dog").mkdir()
    litter(root / "train" / "dog")
    fails(lambda: open_classification(f"folder:{root}"), "train/dog", "class folder with no image")


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "folders"])
def test_ilsvrc(tmp_path, nested):
    root, boxes = ilsvrc(tmp_path / "set", nested=nested), write_xml(tmp_path / "boxes")
    clean = open_localisation(f"ilsvrc:{root},boxes={boxes}")
    count = litter(root / "train") + litter(root / "train" / WNIDS[0])
    litter(root / "val")
    litter(boxes)
    (boxes / "._ILSVRC2012_val_a.xml").write_bytes(b"\0\5\26\7")
    train, test = open_localisation(f"ilsvrc:{root},boxes={boxes}")
    assert (train.ids, test.ids) == (clean[0].ids, clean[1].ids) and train.classes == list(WNIDS)
    assert [part.fingerprint for part in (train, test)] == [part.fingerprint for part in clean]
    assert ignored(train) == count and ignored(test) == len(FOLDERS) + len(FILES)


def test_tiny_imagenet(tmp_path):
    root = tiny_imagenet(tmp_path)
    clean = open_classification(f"tiny_imagenet:{root}")
    litter(root / "train")
    litter(root / "train" / WNIDS[0] / "images")
    litter(root / "val" / "images")
    parts = open_classification(f"tiny_imagenet:{root}")
    assert [part.fingerprint for part in parts] == [part.fingerprint for part in clean]
    assert ignored(parts[0]) == 2 * ignored(parts[1]) == 2 * (len(FOLDERS) + len(FILES))


def test_pictures_masks_outliers_and_result_files(tmp_path):
    folder = tmp_path / "holiday"
    wanted = [picture(folder / "a.jpg"), picture(folder / "b.ppm")]
    litter(folder)
    assert find_pictures([folder]) == wanted
    assert find_pictures([folder / ".hidden.jpg"]) == [folder / ".hidden.jpg"]  # named, so wanted
    shutil.rmtree(folder / ".thumbs")
    picture(folder / "deep" / "c.png")
    outliers = open_outliers([f"x={folder}"], 100, False)[0].images
    assert outliers.ids == ["a.jpg", "b.ppm", "deep/c.png"] and ignored(outliers) == 9
    for name in ("m.png", "._m.png"):
        picture(tmp_path / "masks" / name)
    assert list(mask_files(tmp_path / "masks", [])) == ["m"]
    for name in ("comp3_det_test_cat.txt", "._comp3_det_test_cat.txt"):
        (tmp_path / name).write_text("1 0.5 1 1 5 5\n")
    assert len(read_voc_results(tmp_path, "test", ["1"], ["cat"]).image) == 1


def test_links(tmp_path):
    root = write_folder(tmp_path / "set")
    (root / "train" / "cat" / "up").symlink_to("..")
    fails(lambda: open_classification(f"folder:{root}"), "train/cat/up", "remove the link")
    assert _tree(root)[1][1].endswith(".jpg")
    (root / "train" / "cat" / "up").unlink()
    (root / "train" / "cat" / "self").symlink_to("self")
    train, _ = open_classification(f"folder:{root}")
    assert train.report == ["1 × file that is no image: ignored (first: train/cat/self)"]
    assert _tree(root)[1][1].endswith(".jpg")
    (root / "train" / "cat" / "self.jpg").symlink_to("self.jpg")
    fails(lambda: open_classification(f"folder:{root}"), "self.jpg", "cannot be read")
    (root / "train" / "cat" / "self.jpg").unlink()
    picture(tmp_path / "more" / "deep" / "x.png")
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    assert open_classification(f"folder:{root}")[0].ids[2] == "train/cat/more/deep/x.png"


def test_digits_that_are_no_numbers():
    assert image_index(["m²1.jpg", "m²2.jpg"])[2] == 1


@pytest.mark.parametrize("kind", ["image", "class", "root", "other file"])
def test_names_that_are_no_text(tmp_path, kind, capsys):
    """A name in another encoding is refused before anything runs; one that is no image does no harm."""
    strange = os.fsdecode(b"caf\xe9")
    root = write_folder(tmp_path / (strange if kind == "root" else "set"))
    if kind == "image":
        picture(root / "train" / "cat" / f"{strange}.jpg")
    elif kind == "class":
        for part in ("train", "val"):
            picture(root / part / strange / "0.jpg")
    elif kind == "other file":
        (root / "train" / "cat" / f"{strange}.txt").touch()
        train, _ = open_classification(f"folder:{root}")
        print(*train.report)
        assert "cat/caf\\udce9.txt" in capsys.readouterr().out
        return
    message = fails(lambda: open_classification(f"folder:{root}"), "caf\\udce9", "not UTF-8", "rename")
    message.encode()
    if kind == "image":
        fails(lambda: find_pictures([root / "train" / "cat"]), "caf\\udce9.jpg", "not UTF-8")


def test_a_report_counts_its_problems():
    from backbench.common.data.layout import Report

    report = Report()
    report.note("a", "x")
    report.problem("b", "y", 2)
    assert report.lines() == ["1 × a (first: x)", "2 × b (first: y)"] and report.problems() == [
        "2 × b (first: y)"
    ]
