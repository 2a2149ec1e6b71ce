"""Training and test crops against torchvision's transforms on PIL images; the decoded caches; the device's crops."""

import errno
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, RandomResizedCrop, Resize
from torchvision.transforms import functional as F

from backbench.common.base.errors import UserError
from backbench.common.classify import crops
from backbench.common.classify.crops import CropRecipe, TrainImages, crop_box, random_resized_crop
from backbench.common.data import decode, open_classification, short_sides
from backbench.common.data.decode import read_rgb, resize, resize_short
from backbench.common.data.types import ImageSet

SIZES = [(50, 40), (90, 70), (64, 96), (37, 41), (120, 30)]  # width, height
RECIPE = CropRecipe(epochs=1.0, size=24, resize=32)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


def pixels(width: int, height: int, seed: int) -> np.ndarray:
    """A smooth picture with noise on it: JPEG keeps it, and every resize changes it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def images(tmp_path) -> ImageSet:
    paths = []
    for i, size in enumerate(SIZES):
        paths.append(tmp_path / f"{i}.jpg")
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 1 else 1  # one lies on its side
        Image.fromarray(pixels(*size, seed=i)).save(paths[-1], quality=92, exif=exif)
    labels = np.arange(len(paths), dtype=np.int64) % 2
    return ImageSet("five", ["a", "b"], [path.name for path in paths], paths, labels)


def as_array(images: ImageSet, side: int) -> ImageSet:
    """The same images as a set that is published as arrays, as CIFAR."""
    return replace(
        images, pixels=np.stack([resize(images.read(i), (side, side)) for i in range(len(images))])
    )


def streams(seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(len(SIZES))]


def batch(images: ImageSet, recipe: CropRecipe, seed: int = 0) -> np.ndarray:
    """uint8 (5, size, size, 3): one batch of all images, as the engine draws and moves it."""
    data = TrainImages(images, recipe)
    made = data.on_device(data.batch(list(range(len(images))), streams(seed)), torch.device("cpu"))
    assert made["ids"] == images.ids and made["labels"].tolist() == images.labels.tolist()
    assert made["images"].dtype == torch.uint8
    return made["images"].numpy()


class Scripted:
    """Draws that a test chooses, in the order in which they must be asked for."""

    def __init__(self, *values) -> None:
        self.values = list(values)

    def uniform(self, low, high):
        return low + (high - low) * self.values.pop(0)

    def integers(self, high):
        return int(self.values.pop(0) * high)


# random resized crops


@pytest.mark.parametrize("size", [16, 24, 57, 200])
def test_random_resized_crop_is_torchvisions(size):
    for seed in range(12):
        image = pixels(*SIZES[seed % 5], seed)
        x, y, w, h = crop_box(image.shape[1], image.shape[0], np.random.default_rng(seed))
        expected = F.resized_crop(Image.fromarray(image), y, x, h, w, [size, size])
        done = random_resized_crop(image, size, np.random.default_rng(seed))
        np.testing.assert_array_equal(done, np.asarray(expected))


def test_crop_box_draws():
    # area, ratio, x, y; a share of .5 of the log ratio's range is 1
    assert crop_box(100, 100, Scripted(0.5, 0.5, 0.5, 0.25)) == (14, 7, 73, 73)
    # the first proposal is too wide: it draws no corner
    assert crop_box(100, 100, Scripted(1.0, 1.0, 0.5, 0.5, 0.0, 0.99)) == (0, 27, 73, 73)


@pytest.mark.parametrize("size", [(400, 3), (3, 400), (1, 1)])
def test_crop_box_of_extreme_shapes_is_torchvisions(size):
    top, left, height, width = RandomResizedCrop.get_params(
        torch.zeros(3, size[1], size[0]), [1.0, 1.0], [3 / 4, 4 / 3]
    )
    rejected = [1.0, 0.0] * 10 if size[0] > size[1] else [1.0, 1.0] * 10
    draws = [1.0, 0.5, 0.0, 0.0] if size == (1, 1) else rejected
    assert crop_box(*size, Scripted(*draws)) == (left, top, width, height)


def test_training_crops_from_files(images):
    done = batch(images, RECIPE)
    for i, rng in enumerate(streams()):
        image = read_rgb(images.paths[i])
        x, y, w, h = crop_box(image.shape[1], image.shape[0], rng)
        expected = F.resized_crop(Image.fromarray(image), y, x, h, w, [24, 24])
        expected = F.hflip(expected) if rng.random() < 0.5 else expected
        np.testing.assert_array_equal(done[i], np.asarray(expected))
    assert not np.array_equal(done, batch(images, RECIPE, seed=1))
    assert np.array_equal(done, batch(images, replace(RECIPE, cache="file")))


@pytest.mark.parametrize("backend", ["cv2_area", "cv2_linear", "torch"])
def test_the_resize_backend_is_the_recipes(images, backend):
    recipe = replace(RECIPE, resize_backend=backend)
    i, rng = 1, streams()[1]
    image = read_rgb(images.paths[i])
    x, y, w, h = crop_box(image.shape[1], image.shape[0], rng)
    expected = resize(image[y : y + h, x : x + w], (24, 24), backend)
    expected = expected[:, ::-1] if rng.random() < 0.5 else expected
    np.testing.assert_array_equal(batch(images, recipe)[i], expected)
    assert not np.array_equal(crops.test_images(images, recipe), crops.test_images(images, RECIPE))
    square = replace(recipe, crop="shift")
    assert not np.array_equal(batch(images, square), batch(images, replace(square, resize_backend="pil")))


def test_torchs_resize_is_pils_within_two():
    for seed in range(20):
        image = pixels(*SIZES[seed % 5], seed)[seed % 3 :, seed % 4 :]
        image.flags.writeable = False
        size = [(24, 24), (57, 31), (200, 100)][seed % 3]
        done = resize(image, size, "torch")
        assert done.flags.c_contiguous  # not in planes, which takes twice as long
        difference = done.astype(int) - resize(image, size)
        assert np.abs(difference).max() <= 2 and abs(difference.mean()) < 0.03


# squares


def expected_squares(images: ImageSet, recipe: CropRecipe, seed: int) -> np.ndarray:
    """The crops by torchvision's functions on PIL images, with the draws written out."""
    pad = recipe.pad if recipe.crop == "pad" else 0
    rows = []
    for i, rng in enumerate(streams(seed)):
        square = F.resize(Image.fromarray(images.read(i)), [recipe.resize, recipe.resize])
        if recipe.crop == "none":
            picture = F.center_crop(square, [recipe.size, recipe.size])
        else:
            x, y = rng.integers(recipe.resize + 2 * pad - recipe.size + 1, size=2).tolist()
            picture = F.crop(F.pad(square, [pad] * 4), y, x, recipe.size, recipe.size)
        rows.append(np.asarray(F.hflip(picture) if rng.random() < 0.5 else picture))
    return np.stack(rows)


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("crop", ["shift", "pad", "none"])
@pytest.mark.parametrize("where", [{"cache": "square"}, {"cache": "file"}, {"resident": True}])
@pytest.mark.parametrize("size, pad", [(24, 4), (32, 4), (31, 40)])
def test_square_crops_are_torchvisions(images, arrays, crop, where, size, pad):
    recipe = replace(RECIPE, crop=crop, size=size, pad=pad, **where)
    recipe.check()
    given = as_array(images, 32) if arrays else images
    for seed in range(3):
        np.testing.assert_array_equal(batch(given, recipe, seed), expected_squares(given, recipe, seed))


def test_arrays_of_another_size_are_resized(images):
    given, recipe = as_array(images, 40), replace(RECIPE, crop="pad")
    np.testing.assert_array_equal(batch(given, recipe), expected_squares(given, recipe, 0))


def test_large_sets_are_not_decoded_blindly(images, monkeypatch):
    recipe = replace(RECIPE, crop="shift")
    small = TrainImages(images, recipe)
    assert small.squares is not None and small.workers == 0
    monkeypatch.setattr(crops, "SQUARES", 5 * 32 * 32 * 3 - 1)
    monkeypatch.setattr(crops, "decode_all", lambda *_: pytest.fail("decoded"))
    large = TrainImages(images, recipe)
    assert large.squares is None and large.workers >= 2
    np.testing.assert_array_equal(batch(images, recipe), expected_squares(images, recipe, 0))


def test_the_device_holds_the_set_once(images):
    data = TrainImages(images, replace(RECIPE, crop="shift", resident=True))
    held = []
    for seed in range(2):
        made = data.batch([3, 1], streams(seed)[:2])
        assert "images" not in made and sum(t.nbytes for t in made.values() if torch.is_tensor(t)) < 100
        assert set(data.on_device(made, torch.device("cpu"))) == {"images", "labels", "ids"}
        held.append(data.held)
    assert held[0] is held[1]


def test_a_set_that_does_not_fit_the_device(images, monkeypatch):
    data = TrainImages(images, replace(RECIPE, crop="shift", resident=True))

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(UserError, match=r"resident=true, but 0\.0 GB of images do not fit on cpu"):
        data.on_device(data.batch([0], streams()[:1]), torch.device("cpu"))


# test crops


@pytest.mark.parametrize("size, short", [(24, 32), (32, 32), (25, 48)])
def test_test_images_are_torchvisions(images, size, short):
    recipe = replace(RECIPE, size=size, resize=short)
    transform = Compose([Resize(short), CenterCrop(size)])
    expected = [np.asarray(transform(Image.fromarray(images.read(i)))) for i in range(len(images))]
    np.testing.assert_array_equal(crops.test_images(images, recipe), expected)
    for side in (size, short, 40):
        given = as_array(images, side)
        expected = [np.asarray(transform(Image.fromarray(square))) for square in given.pixels]
        np.testing.assert_array_equal(crops.test_images(given, recipe), expected)


# the short-side cache


def expected_shorts(images: ImageSet, side: int) -> list[np.ndarray]:
    whole = [read_rgb(path) for path in images.paths]
    return [image if min(image.shape[:2]) <= side else resize_short(image, side) for image in whole]


def equal(cached, expected) -> bool:
    return len(cached) == len(expected) and all(np.array_equal(a, b) for a, b in zip(cached, expected))


def test_short_sides(images, monkeypatch):
    expected = expected_shorts(images, 36)
    assert min(image.shape[0] for image in expected) == 30  # one is smaller and stays
    assert equal(short_sides.short_sides(images.paths, 36), expected)
    monkeypatch.setattr(short_sides, "read_rgb", lambda _: pytest.fail("decoded again"))
    cached = short_sides.short_sides(images.paths, 36)
    assert equal(cached, expected) and not cached[0].flags.writeable


def test_random_resized_crops_from_the_short_cache(images):
    recipe = replace(RECIPE, cache="short", resize=36)
    done = batch(images, recipe)
    for i, (image, rng) in enumerate(zip(expected_shorts(images, 36), streams())):
        crop = random_resized_crop(image, 24, rng)
        np.testing.assert_array_equal(done[i], crop[:, ::-1] if rng.random() < 0.5 else crop)
    whole = replace(recipe, resize=200)  # nothing is shrunk
    np.testing.assert_array_equal(batch(images, whole), batch(images, replace(whole, cache="file")))


def interrupted(images: ImageSet, monkeypatch, error: BaseException) -> list[str]:
    """Build until the fourth image raises; then the names of those that a second build decodes."""
    monkeypatch.setattr(short_sides, "BLOCK", 2)

    def fails_on_the_fourth(path):
        if path == images.paths[3]:
            raise error
        return read_rgb(path)

    with monkeypatch.context() as patch:
        patch.setattr(short_sides, "read_rgb", fails_on_the_fourth)
        with pytest.raises((UserError, KeyboardInterrupt)):
            short_sides.short_sides(images.paths, 36, workers=1)
    decoded = []
    monkeypatch.setattr(short_sides, "read_rgb", lambda path: decoded.append(path.name) or read_rgb(path))
    assert equal(short_sides.short_sides(images.paths, 36), expected_shorts(images, 36))
    return sorted(decoded)


def test_a_killed_build_continues(images, monkeypatch, tmp_path):
    assert interrupted(images, monkeypatch, KeyboardInterrupt()) == ["2.jpg", "3.jpg", "4.jpg"]
    assert {path.suffix for path in (tmp_path / "cache" / "short").iterdir()} == {".u8", ".npy", ".lock"}


def test_a_full_disk_keeps_what_was_built(images, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    assert interrupted(images, monkeypatch, error) == ["2.jpg", "3.jpg", "4.jpg"]


def test_the_disk_is_asked_before_decoding(images, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10, 0, 10))
    monkeypatch.setattr(short_sides, "read_rgb", lambda _: pytest.fail("decoded"))
    for recipe in (replace(RECIPE, cache="short"), replace(RECIPE, crop="shift")):
        with pytest.raises(UserError, match=r"do not fit there \(0\.0 GB are free\)"):
            TrainImages(images, recipe)


def test_one_builds_and_the_other_waits(images, monkeypatch):
    decoded, found = [], []
    monkeypatch.setattr(short_sides, "read_rgb", lambda path: decoded.append(path.name) or read_rgb(path))

    def build():
        found.append(short_sides.short_sides(images.paths, 36))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(decoded) == images.ids and len(found) == 3
    assert all(equal(cached, expected_shorts(images, 36)) for cached in found)


def test_a_changed_file_is_decoded_again(images):
    before = short_sides.short_sides(images.paths, 36)[0].copy()
    Image.fromarray(pixels(50, 40, seed=99)).save(images.paths[0])
    assert not np.array_equal(short_sides.short_sides(images.paths, 36)[0], before)


# decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}])
def test_jpegs_decode_as_pillow_does(tmp_path, mode, how):
    path = tmp_path / "a.jpg"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels(53, 37, seed=3)).convert(mode).save(path, "JPEG", exif=exif, **how)
        stored = Image.open(path)
        upright = ImageOps.exif_transpose(stored).convert("RGB")
        np.testing.assert_array_equal(read_rgb(path), np.asarray(upright))
        if orientation >= 5:  # boxes of the stored frame: not turned
            np.testing.assert_array_equal(read_rgb(path, (53, 37)), np.asarray(stored.convert("RGB")))


def test_the_usual_jpeg_is_decoded_by_opencv(images, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded by Pillow"))
    assert read_rgb(images.paths[0]).shape == (40, 50, 3)


def test_without_opencvs_rgb_decoding_pillow_decodes(images, monkeypatch):
    import cv2

    expected = read_rgb(images.paths[0])
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    assert decode._decode_jpeg(images.paths[0].read_bytes()) is None
    np.testing.assert_array_equal(read_rgb(images.paths[0]), expected)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(tmp_path, progressive):
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels(90, 70, seed=3)).save(path, progressive=progressive)
    whole = path.read_bytes()
    for cut in range(70, len(whole), len(whole) // 25):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"a\.jpg: not a readable image"):
            read_rgb(path)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    colour = Image.fromarray(pixels(60, 50, seed=1))
    wide = np.asarray(colour.convert("L")).astype(np.uint16) * 257
    for part in ("train", "val"):
        save(tmp_path / part / "cat" / "colour.jpg", colour)
        save(tmp_path / part / "cat" / "grey.jpg", colour.convert("L"))
        save(tmp_path / part / "cat" / "inks.jpg", colour.convert("CMYK"))
        save(tmp_path / part / "cat" / "wide.png", Image.fromarray(wide))
    return tmp_path


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, cache="short"), replace(RECIPE, crop="pad")])
def test_grey_cmyk_and_16_bit_images_are_cropped(folder, recipe):
    train, test = open_classification(f"folder:{folder}")
    data = TrainImages(train, recipe)
    made = data.batch([0, 1, 2, 3], [np.random.default_rng(7) for _ in range(4)])["images"].numpy()
    assert train.ids[3].endswith("wide.png")
    np.testing.assert_array_equal(made[3][..., 0], made[3][..., 2])  # 16-bit grey
    assert np.abs(made[1].astype(int) - made[3]).mean() < 6  # the same picture, one through JPEG
    assert np.abs(made[0].astype(int) - made[2]).mean() < 25  # through inks
    assert crops.test_images(test, recipe).shape == (4, 24, 24, 3)


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, cache="short"), replace(RECIPE, crop="pad")])
@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b""])
def test_truncated_and_empty_images_are_named(folder, recipe, spoil):
    train, _ = open_classification(f"folder:{folder}")  # and damaged after the check
    train.paths[1].write_bytes(spoil(train.paths[1].read_bytes()))
    with pytest.raises(UserError, match=r"grey\.jpg: not a readable image") as caught:
        TrainImages(train, recipe).batch([0, 1], streams()[:2])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"grey\.jpg.*1 of 4 images"):
        open_classification(f"folder:{folder}")


# recipes


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 33}, "size=33 and resize=32"),
        ({"size": 0}, "size=0"),
        ({"pad": -1}, "pad=-1"),
        ({"crop": "centre"}, "crop=centre"),
        ({"resize_backend": "lanczos"}, "resize_backend=lanczos"),
        ({"cache": "square"}, "cache=square with crop=random_resized; choose auto, file or short"),
        ({"cache": "short", "crop": "pad"}, "cache=short with crop=pad; choose auto, file or square"),
        ({"resident": True}, "resident=true needs"),
        ({"resident": True, "crop": "shift", "cache": "file"}, "resident=true needs"),
        ({"resident": True, "crop": "shift", "colour": "code"}, "resident=true needs"),
    ],
)
def test_recipes_that_cannot_be_cropped(change, message):
    with pytest.raises(UserError, match=message):
        replace(RECIPE, **change).check()


def test_colour_is_drawn_between_crop_and_flip(images):
    recipe = replace(RECIPE, crop="none", size=32, colour="code")
    plain, coloured = batch(images, replace(recipe, colour="none")), batch(images, recipe)
    assert plain.shape == coloured.shape and np.abs(plain.astype(int) - coloured).mean() > 3
    i, rng = 2, streams()[2]
    square = resize(images.read(i), (32, 32))
    expected = crops.lighting(crops.colour_jitter(square, rng), rng)
    expected = expected[:, ::-1] if rng.random() < 0.5 else expected
    np.testing.assert_array_equal(coloured[i], expected)
