"""Images to arrays: every kind of file, EXIF rotation, resizing, the decoded cache, thumbnails."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import fails, picture
from PIL import Image

from backbench.common.data.check import check_images
from backbench.common.data.decode import (
    Fit,
    centre_crop,
    decode_all,
    read_headers,
    read_rgb,
    resize,
    resize_short,
)
from backbench.common.data.thumbnails import read_thumbnails, write_thumbnails


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
        patch.setattr("backbench.common.data.decode.read_rgb", lambda path: pytest.fail("decoded again"))
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


# optional parts of files: none of them may cost an image


def png_chunk(name: bytes, body: bytes, wrong: bool = False) -> bytes:
    sum_ = zlib.crc32(name + body) ^ wrong
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", sum_)


def with_chunk(path: Path, chunk: bytes, last: bool = False) -> None:
    """Put a chunk of a PNG after its header, or before its end."""
    data = path.read_bytes()
    place = len(data) - 12 if last else 33
    path.write_bytes(data[:place] + chunk + data[place:])


def with_segment(path: Path, marker: int, body: bytes) -> None:
    """Put an application's segment first into a JPEG."""
    data = path.read_bytes()
    path.write_bytes(data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + data[2:])


TIFF = b"II*\0\10\0\0\0"  # a header, its directory missing
TURN_6 = TIFF + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
CHUNKS = {
    "EXIF cut short": png_chunk(b"eXIf", TIFF[:6]),
    "EXIF without its directory": png_chunk(b"eXIf", TIFF),
    "EXIF that is something else": png_chunk(b"eXIf", b"hello"),
    "EXIF with a wrong sum": png_chunk(b"eXIf", TURN_6, wrong=True),
    "a text with a wrong sum": png_chunk(b"tEXt", b"key\0value", wrong=True),
    "a text too large": png_chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(2 << 20))),
    "gamma": png_chunk(b"gAMA", b"\0"),
    "chromaticities": png_chunk(b"cHRM", b"\0" * 7),
    "a colour profile": png_chunk(b"iCCP", b"name\0\7rubbish"),
    "resolution": png_chunk(b"pHYs", b"\0"),
    "animation": png_chunk(b"acTL", b"\0"),
}
SEGMENTS = {
    "JFIF": (0xE0, b"JFIF\0"),
    "EXIF": (0xE1, b"Exif\0\0" + TIFF[:6]),
    "XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
    "a colour profile": (0xE2, b"ICC_PROFILE\0"),
    "several pictures": (0xE2, b"MPF\0" + TIFF),
    "Photoshop": (0xED, b"Photoshop 3.0\0008BIM"),
    "Adobe": (0xEE, b"Adobe"),
    "a comment": (0xFE, b""),
}


def still_read(path: Path, orientation: int = 1) -> np.ndarray:
    """The pixels of an image that header, check and decoder agree on."""
    assert check_images([path]) == [] and read_headers([path]).tolist() == [[20, 10, orientation]]
    return read_rgb(path)


@pytest.mark.parametrize("what", CHUNKS)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_of_a_png(tmp_path, what, last):
    path = picture(tmp_path / "a.png")
    pixels = read_rgb(path)
    with_chunk(path, CHUNKS[what], last)
    np.testing.assert_array_equal(still_read(path), pixels)
    if not last and "EXIF" not in what:  # the rest of the metadata holds
        with_chunk(path, png_chunk(b"eXIf", TURN_6))
        np.testing.assert_array_equal(still_read(path, 6), np.rot90(pixels, -1))
    path.write_bytes(path.read_bytes()[:400])
    assert check_images([path], skip_bad=True) == [0]
    fails(lambda: read_rgb(path), "not a readable image")


@pytest.mark.parametrize("what", SEGMENTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_of_a_jpeg(tmp_path, what):
    path = picture(tmp_path / "a.jpg")
    pixels = read_rgb(path)
    with_segment(path, *SEGMENTS[what])
    np.testing.assert_array_equal(still_read(path), pixels)
    path.write_bytes(path.read_bytes()[:-200])
    assert check_images([path], skip_bad=True) == [0]


@pytest.mark.parametrize("exif", [TIFF[:6], TIFF, b"hello", b"Exif\0\0", b"\0"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_of_a_webp(tmp_path, exif):
    path = picture(tmp_path / "a.webp", lossless=True, exif=exif, xmp=b"\xff<", icc_profile=b"rubbish")
    np.testing.assert_array_equal(still_read(path), read_rgb(picture(tmp_path / "b.webp", lossless=True)))


def test_damaged_metadata_says_nothing(tmp_path):
    path = picture(tmp_path / "a.webp", lossless=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01")
    code = f"from backbench.common.data.decode import read_rgb; read_rgb({str(path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_transparency_survives_a_damaged_text(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10), (200, 0, 0)).save(path, transparency=(200, 0, 0))
    with_chunk(path, CHUNKS["a text with a wrong sum"])
    assert not still_read(path).any()


def test_a_file_that_the_system_does_not_give_is_no_bad_image(tmp_path, monkeypatch):
    """Nothing of it is remembered: once the disk answers, the image is fine."""
    path = picture(tmp_path / "a.png")
    with monkeypatch.context() as patch:

        def refused(*_, **__):
            raise PermissionError(13, "Permission denied")

        patch.setattr("pathlib.Path.open", refused)
        for look in (lambda: check_images([path], skip_bad=True), lambda: read_headers([path])):
            fails(look, "a.png: cannot be read (Permission denied)")
    still_read(path)
