"""`backbench verify`: what is there, what lacks, and broken images, for every kind of data."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import write_class_folders
from PIL import Image
from test_cifar import write_cifar
from test_wsol_data import WNIDS, ilsvrc, tiny_imagenet, write_xml

from backbench.common.base.errors import UserError
from backbench.common.base.files import write_json
from backbench.common.cli import main as cli
from backbench.common.data import published
from backbench.common.data.scenes import ensure_world
from backbench.common.data.verify import verify


@pytest.fixture(scope="module")
def world():
    return ensure_world(size="smoke")


def run(capsys, *arguments: str) -> tuple[int, str]:
    """`backbench verify …`: exit code and what was printed."""
    code = cli._main(["verify", *map(str, arguments)])
    return code, capsys.readouterr().out


def lines(out: str, state: str) -> list[str]:
    return [line[8:] for line in out.splitlines() if line.startswith(state)]


def test_class_folders(class_folders, capsys):
    code, out = run(capsys, f"folder:{class_folders}")
    assert code == 0 and not lines(out, "PROBLEM") and not lines(out, "differs")
    assert {"3 classes: cat, dog, fox", "18 train images", "18 val images"} <= set(lines(out, "ok"))
    assert "36 of 36 images decoded (a sample), 48 × 40 to 48 × 40" in out
    assert out.splitlines()[-1].startswith(f"folder:{class_folders}: fine (")


def test_full_names_every_broken_image_and_a_sample_need_not(tmp_path, capsys):
    root = write_class_folders(tmp_path, per_class=40)
    broken = [root / "train" / "dog" / "7.jpg", root / "val" / "fox" / "3.jpg"]
    broken[0].write_bytes(broken[0].read_bytes()[:300])
    broken[1].write_bytes(b"")
    code, out = run(capsys, f"folder:{root}", "--full")
    problems = lines(out, "PROBLEM")
    assert code == 1 and len(problems) == 2 and "2 problems" in out
    assert str(broken[0]) in problems[0] and str(broken[1]) in problems[1]
    assert "238 of 240 images decoded (every image)" in out
    assert "of 64 images decoded (a sample)" in run(capsys, f"folder:{root}")[1]


def test_the_missing_piece_is_named(tmp_path, capsys):
    root = write_class_folders(tmp_path)
    shutil.rmtree(root / "val")
    code, out = run(capsys, f"folder:{root}")
    assert code == 1 and "has no val/ folder" in lines(out, "PROBLEM")[0]
    code, out = run(capsys, f"cub:{tmp_path}")
    assert code == 1 and "classes.txt" in lines(out, "PROBLEM")[0]
    code, out = run(capsys, f"voc:{tmp_path / 'none'}")
    assert code == 1 and "no such folder" in lines(out, "PROBLEM")[0]
    with pytest.raises(UserError, match="KIND one of imagenet, ilsvrc, tiny_imagenet, cifar10"):
        verify(str(tmp_path))
    with pytest.raises(UserError, match="'yeer' is no option"):
        verify("voc:/x,yeer=2007")


def imagenet(root: Path, train: int = 3, val: int = 2) -> Path:
    for part, count in (("train", train), ("val", val)):
        for name in ("n01440764", "n01443537", "n01484850"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 6), (i % 256, i // 256 * 80, 9 * len(part))).save(
                    folder / f"{name}_{i}.JPEG"
                )
    return root


def test_imagenet_names_classes_and_counts(tmp_path, capsys, monkeypatch):
    root = imagenet(tmp_path / "a")
    monkeypatch.setattr(published, "IMAGENET", {"train": 10, "val": 6})
    code, out = run(capsys, f"imagenet:{root}")
    problems = "\n".join(lines(out, "PROBLEM"))
    assert (
        code == 1 and "3 of 1000 classes; missing: n01491361, " in problems
    )  # timm's list is installed here
    assert "a subset: 9 of the 10 train images that are published" in problems
    assert "6 val images, as published" in lines(out, "ok")
    assert "val: 3 classes without 50 images: n01440764 2, n01443537 2" in problems
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    code, out = run(capsys, f"imagenet:{root}")
    assert code == 1 and "ILSVRC2012_val_00000001.JPEG: the validation images are not sorted" in out
    (tmp_path / "b" / "Data" / "CLS-LOC").mkdir(parents=True)
    assert "give imagenet:" in run(capsys, f"imagenet:{tmp_path / 'b'}")[1]


def test_imagenet_whole(tmp_path, capsys, monkeypatch):
    root = imagenet(tmp_path, train=732, val=50)
    monkeypatch.setattr(published, "IMAGENET", {"train": 2196, "val": 150})
    monkeypatch.setattr(published, "_synsets", lambda: [])
    out = run(capsys, f"imagenet:{root}")[1]
    assert len(lines(out, "PROBLEM")) == 1 and "3 of 1000 classes" in out  # nothing else lacks
    assert {"train: 732 to 1,300 images in every class", "val: 50 images in every class"} <= set(
        lines(out, "ok")
    )


def test_ilsvrc_counts_images_and_boxes(tmp_path, capsys, monkeypatch):
    numbers = published.IMAGENET, published.IMAGENET_BOXED, published.IMAGENET_VAL_BOXES
    assert numbers == ({"train": 1_281_167, "val": 50_000}, 544_546, 80_477)
    root, boxes = ilsvrc(tmp_path / "a", nested=False), write_xml(tmp_path / "xml")
    code, out = run(capsys, f"ilsvrc:{root},boxes={boxes}")
    problems = "\n".join(lines(out, "PROBLEM"))
    assert code == 1 and f"{root / 'train'}: 2 of 1000 classes; missing: n01484850, " in problems
    assert "a subset: 3 of the 50,000 val images that are published" in problems
    assert lines(out, "differs") == ["a subset: 4 of the 80,477 val boxes that are published"]
    train_boxes = tmp_path / "train.txt"
    train_boxes.write_text(f"train/{WNIDS[0]}/{WNIDS[0]}_0.JPEG,1,1,5,5\n" * 2)
    monkeypatch.setattr(published, "IMAGENET", {"train": 4, "val": 3})
    monkeypatch.setattr(published, "IMAGENET_VAL_BOXES", 4)
    out = run(capsys, f"ilsvrc:{root},boxes={boxes},train_boxes={train_boxes}")[1]
    assert {"4 train images, as published", "3 val images, as published", "4 val boxes, as published"} <= set(
        lines(out, "ok")
    )
    assert lines(out, "differs") == ["a subset: 1 of the 544,546 train images with boxes that are published"]
    assert "has no train/" in run(capsys, f"ilsvrc:{root / 'train'}")[1]


def test_tiny_imagenet(tmp_path, capsys, monkeypatch):
    assert (published.TINY_IMAGENET, published.TINY_CLASSES) == ({"train": 100_000, "val": 10_000}, 200)
    root = tiny_imagenet(tmp_path)
    code, out = run(capsys, f"tiny_imagenet:{root}")
    problems = "\n".join(lines(out, "PROBLEM"))
    assert code == 1 and f"2 of 200 classes: {WNIDS[0]}, {WNIDS[1]}" in problems
    assert "a subset: 4 of the 100,000 train images that are published" in problems
    monkeypatch.setattr(published, "TINY_CLASSES", 2)
    monkeypatch.setattr(published, "TINY_IMAGENET", {"train": 4, "val": 3})
    code, out = run(capsys, f"tiny_imagenet:{root}")
    assert code == 1 and lines(out, "PROBLEM") == ["val: 1 to 2 images a class, not equally many"]
    monkeypatch.setattr(published, "TINY_IMAGENET", {"train": 4, "val": 2})
    (root / "val" / "images" / "val_2.JPEG").unlink()
    code, out = run(capsys, f"tiny_imagenet:{root}")
    assert code == 0 and "train: 4 images have their box" in lines(out, "ok")
    (root / "train" / WNIDS[0] / f"{WNIDS[0]}_boxes.txt").write_text(f"{WNIDS[0]}_0.JPEG\t0\t0\t63\t63\n")
    out = run(capsys, f"tiny_imagenet:{root}")[1]
    assert lines(out, "PROBLEM") == ["train: 3 images have their box"]


@pytest.mark.parametrize("kind, version", [("cifar10", "python"), ("cifar100", "binary")])
def test_cifar(kind, version, tmp_path, capsys, monkeypatch):
    folder = write_cifar(tmp_path, kind, version)
    code, out = run(capsys, f"{kind}:{tmp_path}")
    problems = "\n".join(lines(out, "PROBLEM"))
    total = 20 if kind == "cifar10" else 4
    assert code == 1 and f"a subset: {total} of the 50,000 train images that are published" in problems
    assert ("its MD5 is not the published one" in problems) == (version == "python")
    monkeypatch.setattr(published, "CIFAR", {"train": total, "test": 4})
    monkeypatch.setattr(published, "CIFAR_MEAN", {kind: tuple(_mean(folder, version))})
    out = run(capsys, f"{kind}:{tmp_path}")[1]
    assert "mean training pixel" in "".join(lines(out, "ok")) and f"{total} train images, as published" in out


def _mean(folder: Path, version: str):
    from backbench.common.data import open_classification

    kind = "cifar100" if "100" in folder.name else "cifar10"
    return open_classification(f"{kind}:{folder}")[0].pixels.reshape(-1, 3).mean(0).round(1)


def test_cifar_md5_of_the_published_files_pass(tmp_path, capsys, monkeypatch):
    from torchvision import datasets

    folder = write_cifar(tmp_path, "cifar100", "python")
    md5 = {path.name: published.file_md5(path) for path in folder.iterdir()}
    for key in ("train", "test"):
        monkeypatch.setattr(datasets.CIFAR100, f"{key}_list", [[key, md5[key]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {**datasets.CIFAR100.meta, "md5": md5["meta"]})
    assert "3 files with the published MD5" in lines(run(capsys, f"cifar100:{folder}")[1], "ok")


def test_cub(world, capsys, monkeypatch):
    code, out = run(capsys, f"cub:{world.cub}")
    problems = "\n".join(lines(out, "PROBLEM"))
    assert (
        code == 1 and "of the 5,994 train images" in problems and "published [60, 27, 385, 331]" in problems
    )


def test_voc_by_year(world, tmp_path, capsys, monkeypatch):
    code, out = run(capsys, f"voc:{world.vocdevkit}")
    assert code == 0 and "images decoded (a sample)" in out and "of 1 classes" not in out
    year = next(world.vocdevkit.glob("VOC*"))
    shutil.copytree(year, tmp_path / "VOC2007")
    code, out = run(capsys, f"voc:{tmp_path}")
    count = len((year / "ImageSets" / "Main" / "trainval.txt").read_text().split())
    assert (
        code == 0 and f"a subset: {count} of the 5,011 images of VOC2007 trainval" in lines(out, "differs")[0]
    )
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "test.txt").unlink()
    code, out = run(capsys, f"voc:{tmp_path}")
    assert code == 1 and "detection/finetune.py: " in out and "test.txt: no such split 'test'" in out
    (tmp_path / "VOC2007").rename(tmp_path / "VOC2012")
    assert (
        run(capsys, f"voc:{tmp_path}")[0] == 1
    )  # a training needs a test split, and VOC2012's is not published
    monkeypatch.setitem(published.VOC, ("VOC2012", "train"), (count - count // 2, -1))
    code, out = run(capsys, f"voc:{tmp_path},year=2012,train=train,test=val")
    assert code == 0 and f"{count - count // 2} images of VOC2012 train, as published" in out
    assert "objects" in lines(out, "differs")[0]
    next((tmp_path / "VOC2012" / "JPEGImages").iterdir()).unlink()
    code, out = run(capsys, f"voc:{tmp_path},train=train,test=val")
    assert code == 1 and "listed there are absent" in out


def test_an_image_in_both_splits_is_a_problem(world, tmp_path, capsys):
    code, out = run(capsys, f"voc:{world.vocdevkit},year=2007,train=trainval,test=train")
    assert code == 1 and "image is in training and in the test set" in lines(out, "PROBLEM")[0]
    year = tmp_path / "VOC2007"
    shutil.copytree(world.vocdevkit / "VOC2007", year)
    lists = year / "ImageSets" / "Main"
    name = (lists / "trainval.txt").read_text().split()[0]
    with (lists / "test.txt").open("a") as file:
        file.write(f"{name}\n")
    code, out = run(capsys, f"voc:{tmp_path}")
    assert code == 1 and lines(out, "PROBLEM") == [
        f"test: 1 × image is in training and in the test set (first: {name}.jpg)"
    ]
    assert "1 problem (" in out  # the training would run
    root = write_class_folders(tmp_path / "folder")
    shutil.copy(root / "train" / "cat" / "0.jpg", root / "val" / "dog" / "0.jpg")
    code, out = run(capsys, f"folder:{root}")
    assert code == 1 and "is also the training image" in lines(out, "PROBLEM")[0]


def test_verify_is_fine_only_where_the_command_runs(tmp_path, capsys):
    """The same readers: what stops a command, or changes its score, is a problem that names it."""
    root = write_class_folders(tmp_path / "set", per_class=2)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("path,x0,y0,x1,y1\nval/cat/0.jpg,0,0,1,1\nval/cat/1.jpg,.5,0,.5,1\n")
    code, out = run(capsys, f"folder:{root},boxes={boxes}")
    assert code == 1 and "box with no area: dropped" in lines(out, "PROBLEM")[0] and "would not" not in out
    boxes.write_text("path,x0,y0,x1,y1\nval/cat/0.jpg,.5,0,.2,1\n")
    code, out = run(capsys, f"folder:{root},boxes={boxes}")
    assert code == 1 and "pretrain/run.py and wsol/finetune.py: " in out and "swapped corners" in out
    boxes.write_text("path,x0,y0,x1,y1\ntrain/cat/0.jpg,0,0,1,1\n")
    code, out = run(capsys, f"folder:{root},boxes={boxes}")
    assert code == 1 and "wsol/finetune.py: " in out and "exclude_boxed=1" in out
    assert "1 problem; wsol/finetune.py would not run (" in out
    boxes.write_text("path,x0,y0,x1,y1\nval/cat/0.jpg,0,0,1,1\n")
    (root / "train" / ".thumbs").mkdir()
    code, out = run(capsys, f"folder:{root},boxes={boxes}")
    assert code == 0 and "train: 1 × hidden or system file or folder: ignored" in "".join(lines(out, "note"))
    shutil.copy(root / "train" / "cat" / "0.jpg", root / "val" / "cat" / "0.jpg")
    code, out = run(capsys, f"folder:{root},boxes={boxes}")
    assert code == 1 and len(lines(out, "PROBLEM")) == 1 and "wsol/finetune.py would not run" in out


def test_annotations_at_another_scale_are_a_problem(world, tmp_path, capsys):
    shutil.copytree(world.vocdevkit / "VOC2007", tmp_path / "VOC2007")
    for xml in (tmp_path / "VOC2007" / "Annotations").iterdir():
        text = xml.read_text(encoding="utf-8")
        for tag in ("width", "height", "xmin", "ymin", "xmax", "ymax"):
            text = re.sub(f"<{tag}>([0-9]+)<", lambda found, tag=tag: f"<{tag}>{2 * int(found[1])}<", text)
        xml.write_text(text, encoding="utf-8")
    code, out = run(capsys, f"voc:{tmp_path}")
    assert code == 1 and lines(out, "PROBLEM")[0].startswith("detection/finetune.py: ")
    assert "1 problem; detection/finetune.py would not run (" in out


def test_detection_images_are_read_in_the_frame_of_their_boxes(world, tmp_path, capsys):
    """As training reads them: boxes drawn on the stored pixels of a turned image."""
    year = tmp_path / "VOC2007"
    shutil.copytree(world.vocdevkit / "VOC2007", year)
    path = sorted((year / "JPEGImages").iterdir())[0]
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.open(path).resize((40, 24))
    image.save(path, exif=turned)
    xml = year / "Annotations" / f"{path.stem}.xml"
    text = xml.read_text()
    for tag, value in (("width", 24), ("height", 40), ("xmin", 2), ("ymin", 2), ("xmax", 20), ("ymax", 20)):
        text = re.sub(f"<{tag}>[0-9]+<", f"<{tag}>{value}<", text)
    xml.write_text(text)
    code, out = run(capsys, f"voc:{tmp_path}", "--full")
    assert code == 0 and "24 × 40 to" in out, out


def test_captions_and_coco(world, tmp_path, capsys, monkeypatch):
    code, out = run(capsys, f"captions:{world.coco}")
    assert code == 0 and "train captions" in out
    sizes = {part: _jpegs(world.coco, part) for part in ("train", "val")}
    monkeypatch.setattr(published, "COCO", {name: (count + 1, 0) for name, count in sizes.values()})
    code, out = run(capsys, f"captions:{world.coco}")
    assert code == 0 and len(lines(out, "differs")) == len(set(sizes.values()))


def test_coco_instances(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        Image.new("RGB", (40, 30), (len(part) * 20, 0, 0)).save(tmp_path / part / "1.jpg")
        write_json(
            tmp_path / "annotations" / f"instances_{part}.json",
            {
                "images": [{"id": 1, "file_name": "1.jpg", "width": 40, "height": 30}],
                "annotations": [
                    {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 9, 8], "iscrowd": 0}
                ],
                "categories": [{"id": 3, "name": "car"}],
            },
        )
    code, out = run(capsys, f"coco:{tmp_path}")
    assert code == 0 and "train: 1 object of 1 class" in lines(out, "ok")
    assert "a subset: 1 of the 118,287 train images that are published" in lines(out, "differs")


def _jpegs(root: Path, part: str) -> tuple[str, int]:
    from backbench.common.data import open_captions

    images = open_captions(f"captions:{root}")[part == "val"]
    return images.paths[0].parent.name, len(images)


def test_file_md5(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert published.file_md5(tmp_path / "a") == "900150983cd24fb0d6963f7d28e17f72"
