"""Images to arrays: every kind of file, EXIF rotation, resizing, the decoded cache, thumbnails."""

import hashlib
import io
import os

import cv2
import numpy as np
import pytest
from conftest import fails, picture
from PIL import Image

from common.data.check import check_images
from common.data.decode import Fit, centre_crop, decode_all, read_headers, read_rgb, resize, resize_short
from common.data.thumbnails import read_thumbnails, write_thumbnails


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKBENCH_QUIET", "1")


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
