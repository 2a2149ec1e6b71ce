"""Are the images readable? Answered from the header and the last bytes, before a run starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from backbench.common.base.cache import remember
from backbench.common.base.errors import UserError
from backbench.common.data.decode import threaded
from backbench.common.data.image_file import DamagedImage, with_image

# a JPEG ends with EOI, a PNG with IEND; a few cameras and editors append bytes, so the tail is searched
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
TAIL = 64


def check_images(paths: Sequence[Path], skip_bad: bool = False) -> list[int]:
    """The indices of images that cannot be read; without `skip_bad` the first raises UserError, with their count."""
    faults = image_faults(paths)
    if faults and not skip_bad:
        i, fault = faults[0]
        raise UserError(
            f"{paths[i]}: {fault} ({len(faults)} of {len(paths)} images cannot be read); "
            "repair or remove them, or pass --skip-bad to leave them out"
        )
    return [i for i, _ in faults]


def image_faults(paths: Sequence[Path]) -> list[tuple[int, str]]:
    """Index and fault of each image that cannot be read: absent, empty, no image, or cut short.

    Only an image whose tail lacks its format's end mark (and formats without one) is decoded. Memoised by path, size
    and modification time. A file that the system does not give (no permission, a failing disk) raises UserError.
    """
    absent = [i for i, path in enumerate(paths) if not path.is_file()]
    present = sorted(set(range(len(paths))) - set(absent))
    files = [paths[i] for i in present]
    faults = [(i, "no such file") for i in absent]

    def compute() -> list[list]:
        found = threaded(_fault, files, desc="checking images")
        return [[k, fault] for k, fault in enumerate(found) if fault]

    if files:
        faults += [(present[k], fault) for k, fault in remember("check 2", files, compute)]
    return sorted(faults)


def _fault(path: Path) -> str | None:
    def look(image: Image.Image, file: BinaryIO) -> str | None:
        if 0 in image.size:
            return "has no pixels"
        end, place = ENDS.get(image.format), file.tell()
        file.seek(max(0, file.seek(0, 2) - TAIL))
        tail = file.read()
        file.seek(place)
        if end is None or end not in tail:
            image.load()
        return None

    if not path.stat().st_size:
        return "is empty (0 bytes)"
    try:
        return with_image(path, look)
    except DamagedImage as error:
        return "is not an image" if str(error) == "no image" else f"is cut short or damaged ({error})"
