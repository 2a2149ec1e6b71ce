"""Reading captions: Karpathy's split files, COCO's two years."""

import json

import pytest

from backbench.common.base.errors import UserError


@pytest.fixture
def karpathy(tmp_path):
    """A Karpathy split file of six images in COCO's two folders → (folder, its content, write it)."""
    from PIL import Image

    splits = ["train", "restval", "val", "test", "test", "train"]
    images = []
    for i, split in enumerate(splits):
        folder = "val2014" if i % 2 else "train2014"
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / folder / f"{i}.png")
        sentences = [{"raw": f"Image {i}.", "tokens": ["image", str(i)]}, {"raw": f"again {i}"}]
        image = {"filepath": folder, "filename": f"{i}.png", "cocoid": 10 + i, "imgid": i, "split": split}
        images.append({**image, "sentences": sentences})
    content = {"dataset": "coco", "images": images}

    def write() -> str:
        (tmp_path / "dataset_coco.json").write_text(json.dumps(content))
        return f"captions:{tmp_path},karpathy=dataset_coco.json"

    return tmp_path, images, write


def test_karpathy_splits(karpathy):
    from backbench.common.data import open_captions

    folder, images, write = karpathy
    train, test = open_captions(write())
    assert train.ids == [10, 11, 15] and test.ids == [13, 14]  # restval trains
    assert train.paths[1] == folder / "val2014" / "1.png"
    assert train.captions[0] == ["Image 0.", "again 0"]
    assert open_captions(write() + ",test=val")[1].ids == [12]
    images[0]["sentences"][0]["raw"] = " "
    assert any("empty caption: dropped" in line for line in open_captions(write())[0].report)
    for image in images:  # Flickr's files: no folders, no COCO numbers
        (folder / image.pop("filepath") / image["filename"]).rename(folder / image["filename"])
        del image["cocoid"]
    assert open_captions(write() + ",name=flickr")[1].ids == [3, 4]
    (folder / "images").mkdir()
    for image in images:
        (folder / image["filename"]).rename(folder / "images" / image["filename"])
    for spec in (write(), f"{write()},images={folder / 'images'}"):
        test = open_captions(spec)[1]
        assert test.paths == [folder / "images" / f"{i}.png" for i in (3, 4)]
        assert test.name == f"{folder.name}-karpathy"


def test_bad_karpathy_splits(karpathy):
    from backbench.common.data import open_captions

    folder, images, write = karpathy
    for options, message in (
        (",train=a.json", "does not go with karpathy="),
        (",test=b.json", "it is test or val"),
        (",year=2017", "does not go with"),
    ):
        with pytest.raises(UserError, match=message):
            open_captions(write() + options)
    images[2]["split"] = "Train"
    with pytest.raises(UserError, match=r"images\[2\]: split is 'Train'; expected train, restval, val, test"):
        open_captions(write())
    images[2]["split"] = "val"
    images[3]["cocoid"] = 14
    with pytest.raises(UserError, match=r"images\[4\]: image id 14 is doubled"):
        open_captions(write())
    images[3]["cocoid"] = 13
    (folder / "val2014" / "3.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images listed there are absent"):
        open_captions(write())
    (folder / "dataset_coco.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="expected a Karpathy split file"):
        open_captions(f"captions:{folder},karpathy=dataset_coco.json")


def test_half_a_surrogate_pair(karpathy, tmp_path):
    """Half an emoji (`\\ud83d` in JSON) fits into no file: U+FFFD stands for it, from the first reading on."""
    from backbench.common.data import open_captions

    folder, images, write = karpathy
    images[0]["sentences"][0]["raw"] = "A cat \ud83d sits \U0001f600."
    train, _ = open_captions(write())
    assert train.captions[0][0] == "A cat \ufffd sits \U0001f600."
    first = "dataset_coco.json images[0] sentence"
    assert train.report == [f"1 × caption with half a surrogate pair: U+FFFD in its place (first: {first})"]
    content = {
        "images": [{"id": 1, "file_name": "train2014/0.png"}],
        "annotations": [
            {"image_id": 1.0, "caption": "\udc00\ud83d"},
            {"image_id": 1, "caption": "a cat", "id": []},
        ],
    }
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    train, _ = open_captions(f"captions:images={folder},train={tmp_path}/a.json,val={tmp_path}/b.json")
    assert train.ids == [1] and train.captions == [["\ufffd\ufffd", "a cat"]]
    assert "1 × caption with half a surrogate pair" in train.report[0]
    images[0]["filename"] = "\ud83d.png"
    with pytest.raises(UserError, match=r"images\[0\]: 'filename' is '.ud83d.png', with half a surrogate"):
        open_captions(write())


def test_image_ids_of_any_size(karpathy):
    from backbench.common.data import open_captions

    _, images, write = karpathy
    for image, key in zip(images, (2**53, 2**53 + 1, 2**63, 2**70, 2**70 + 1, 15.0)):
        image["cocoid"] = key
    train, test = open_captions(write())
    assert train.ids == [2**53, 2**53 + 1, 15] and test.ids == [2**70, 2**70 + 1]
    assert {type(key) for key in train.ids} == {int}
    images[0]["cocoid"] = True
    with pytest.raises(UserError, match=r"images\[0\]: 'cocoid' is True; expected an integer"):
        open_captions(write())


def test_coco_of_two_years(tmp_path):
    from PIL import Image

    from backbench.common.data import open_captions

    (tmp_path / "annotations").mkdir()
    for year, key in (("2014", 1), ("2017", 2)):
        for part in ("train", "val"):
            (tmp_path / f"{part}{year}").mkdir()
            Image.new("RGB", (8, 8), (key, 0, 0)).save(tmp_path / f"{part}{year}" / f"{part}.png")
            content = {
                "images": [{"id": key, "file_name": f"{part}.png"}],
                "annotations": [{"id": 1, "image_id": key, "caption": "a cat"}],
            }
            (tmp_path / "annotations" / f"captions_{part}{year}.json").write_text(json.dumps(content))
    assert [part.ids for part in open_captions(f"captions:{tmp_path}")] == [[1], [1]]
    train, test = open_captions(f"captions:{tmp_path},year=2017")
    assert (train.ids, test.paths) == ([2], [tmp_path / "val2017" / "val.png"])
    assert test.name.endswith("-2017")
    with pytest.raises(UserError, match=r"has no captions_train2015\.json"):
        open_captions(f"captions:{tmp_path},year=2015")
