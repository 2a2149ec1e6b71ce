"""Opening image files: one way for headers, checks and decoding, in which metadata is optional."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from backbench.common.base.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"

# Pillow warns, in two lines without the file's name, of metadata that it cannot read and we do not need
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class DamagedImage(Exception):
    """The file is no image, or is cut short or damaged; the message is Pillow's."""


def with_image(path: Path | str, use: Callable[[Image.Image, BinaryIO], Any]) -> Any:
    """`use(image, file)` of the opened, not yet decoded image, and the file of its bytes.

    Where that fails, it is tried again without the file's optional parts: a damaged colour profile, text or comment
    is no damaged image. Raises DamagedImage, and UserError for a file that the system does not give.
    """
    try:
        with Path(path).open("rb") as file:
            try:
                return _use(file, use)
            except DamagedImage:
                file.seek(0)
                plain = _without_options(file.read())
                if plain is None:
                    raise
                return _use(io.BytesIO(plain), use)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _use(file: BinaryIO, use: Callable[[Image.Image, BinaryIO], Any]) -> Any:
    try:
        with Image.open(file) as image:
            return use(image, file)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # for a damaged file Pillow raises almost anything
        if isinstance(error, OSError) and error.errno:  # the disk's fault, not the image's
            raise
        raise DamagedImage("no image" if isinstance(error, Image.UnidentifiedImageError) else error) from None


def exif_orientation(image: Image.Image) -> int:
    """EXIF orientation 1–8 of an opened image, from the header alone.

    1 where there is none, where it cannot be read, and where Pillow turns the image itself.
    """
    if image.format not in ("JPEG", "MPO") and "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # as above; without a readable tag the image is taken as stored
        return 1
    return orientation if orientation in range(2, 9) else 1


def _without_options(data: bytes) -> bytes | None:
    """A PNG or JPEG without what its pixels do not need, EXIF kept; None where there is nothing to leave out."""
    try:
        if data.startswith(PNG):
            plain = _png_chunks(data)
        elif data.startswith(JPEG):
            plain = _jpeg_segments(data)
        else:
            return None
    except (struct.error, IndexError):
        return None
    return plain if len(plain) < len(data) else None


def _png_chunks(data: bytes) -> bytes:
    """The critical chunks (upper case), transparency, and EXIF with the right checksum (PNG, section 5.4)."""
    kept, place = [PNG], len(PNG)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunk = data[place : place + 12 + length]
        name, sound = chunk[4:8], chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and sound):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def _jpeg_segments(data: bytes) -> bytes:
    """All but comments and applications' segments before the pixels; EXIF and Adobe's colour transform stay."""
    kept, place = [JPEG], len(JPEG)
    while data[place] == 0xFF and data[place + 1] != 0xDA:
        marker, (length,) = data[place + 1], struct.unpack_from(">H", data, place + 2)
        segment, body = data[place : place + 2 + length], data[place + 4 : place + 2 + length]
        optional = marker == 0xFE or 0xE0 <= marker <= 0xEF
        wanted = (marker == 0xE1 and body[:4] == b"Exif") or (marker == 0xEE and len(body) >= 12)
        if wanted or not optional:
            kept.append(segment)
        place += len(segment)
    return b"".join([*kept, data[place:]])
