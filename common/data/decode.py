"""Images to arrays: one way to decode, a few to resize, and a cache for sets that fit into memory."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image

from backbench.common.base.cache import cached_array, files_state, need_space, remember
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest
from backbench.common.base.progress import progress
from backbench.common.data.image_file import DamagedImage, exif_orientation, with_image

ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")
JPEG_END, TAIL = b"\xff\xd9", 64  # a few cameras and editors append bytes, so the tail is searched
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACKENDS = ("pil", "cv2_area", "cv2_linear", "torch")


def read_rgb(path: Path | str, frame: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Decode an image to uint8 (H, W, 3) RGB.

    Grey, palette and CMYK become RGB; transparency is laid on black; 16-bit grey is scaled by 255/65535 (of
    16-bit colour Pillow keeps the high byte). The EXIF rotation is applied, unless `frame`, the (width,
    height) in which boxes were drawn, is the stored size: then the boxes belong to the stored pixels.
    Raises UserError naming the file when it cannot be decoded or fits neither way into `frame`.
    """

    def decode(image: Image.Image, file: BinaryIO) -> np.ndarray:
        stored, orientation = image.size, exif_orientation(image)
        turned = stored[::-1] if orientation >= 5 else stored
        wanted = turned if frame is None else tuple(int(side) for side in frame)
        if wanted not in (stored, turned):
            raise UserError(
                f"{path}: is {stored[0]} × {stored[1]}, its boxes are for {wanted[0]} × {wanted[1]}; "
                "has the file changed?"
            )
        turns = orientation != 1 and (frame is None or wanted != stored)
        if image.format == "JPEG" and image.mode == "RGB" and not turns:
            file.seek(0)
            pixels = _decode_jpeg(file.read())
            if pixels is not None and pixels.shape == (stored[1], stored[0], 3):
                return pixels
        image.load()
        return _to_rgb(image.transpose(UPRIGHT[orientation]) if turns else image, path)

    try:
        return with_image(path, decode)
    except DamagedImage as error:
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from None


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3) by OpenCV: Pillow's pixels in .8 of its time. None where Pillow is to decide."""
    import cv2

    rgb = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV 4.11
    if rgb is None or JPEG_END not in data[-TAIL:]:  # of a file cut short, OpenCV may give what there is
        return None
    return cv2.imdecode(np.frombuffer(data, np.uint8), rgb | cv2.IMREAD_IGNORE_ORIENTATION)


def _to_rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    if image.mode.startswith("I"):  # I;16 and its kin, or I for 16-bit PNG in older Pillow
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        grey = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise UserError(f"{path}: floating-point pixels have no fixed range; convert it to 8 bits")
    if image.mode in ALPHA or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def resize(image: np.ndarray, size: tuple[int, int], backend: str = "pil") -> np.ndarray:
    """Resize uint8 (H, W, 3) to `size` = (width, height).

    Backends, recorded by name because they move accuracy by up to a point: `pil` antialiased bilinear (as
    torchvision on PIL images), `cv2_area` area when shrinking and linear when enlarging, `cv2_linear` without
    antialiasing, `torch` the filter of `pil` in half its time, within 2 of 255 of it (16-bit weights).
    """
    height, width = image.shape[:2]
    if (width, height) == tuple(size):
        return image
    if backend not in BACKENDS:
        raise UserError(f"resize backend '{backend}': known are {', '.join(BACKENDS)}")
    if backend == "pil":
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if backend == "torch":
        import torch

        # a copy, for `image` may be read-only; a batch before it is permuted, or torch answers in planes
        planes = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
        shape = (size[1], size[0])
        done = torch.nn.functional.interpolate(planes, shape, mode="bilinear", antialias=True)
        return done[0].permute(1, 2, 0).numpy()
    import cv2

    shrinks = size[0] <= width and size[1] <= height
    area = backend == "cv2_area" and shrinks
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)


def resize_short(image: np.ndarray, side: int, backend: str = "pil") -> np.ndarray:
    """Resize so that the shorter side is `side`; the longer is rounded down, as in torchvision's `Resize`."""
    return resize(image, short_size(image.shape[1], image.shape[0], side), backend)


def short_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) with the shorter side made `side` and the longer rounded down, as in torchvision's `Resize`."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The central (width, height) part of a larger image, rounded as in torchvision's `CenterCrop`."""
    width, height = size
    top = round((image.shape[0] - height) / 2)
    left = round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class Fit:
    """A deterministic transform to `width` × `height`, with a name that says all of it.

    `short=None` squashes the whole image; otherwise the shorter side is made `short` and the centre is kept.
    """

    width: int
    height: int
    short: int | None = None
    backend: str = "pil"

    @property
    def name(self) -> str:
        how = "squash" if self.short is None else f"short{self.short}-centre"
        return f"{how}-{self.width}x{self.height}-{self.backend}"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        size = (self.width, self.height)
        if self.short is None:
            return resize(image, size, self.backend)
        return centre_crop(resize_short(image, self.short, self.backend), size)


def decode_all(
    paths: Sequence[Path], transform: Callable[[np.ndarray], np.ndarray], workers: int | None = None
) -> np.ndarray:
    """All images decoded and transformed: uint8 (n, H, W, 3), memory-mapped and read-only.

    Kept in the cache folder under the files' state, `transform.name` and Pillow's version, so it is done
    once; of several processes one decodes. `transform` maps uint8 (h, w, 3) to one fixed shape; see `Fit`.
    Raises UserError for an image that cannot be decoded and for a full disk.
    """
    if not paths:
        raise UserError("no image to decode")
    key = digest("decoded 1", files_state(paths), transform.name, PIL.__version__)
    return cached_array("decoded", key, lambda file: _decode_into(file, paths, transform, workers))


def _decode_into(file: BinaryIO, paths: Sequence[Path], transform: Callable, workers: int | None) -> None:
    first = transform(read_rgb(paths[0]))
    need_space(Path(file.name).parent, len(paths) * first.nbytes)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *first.shape)}
    np.lib.format.write_array_header_1_0(file, header)
    workers = workers or os.cpu_count() or 1
    block = 64 * workers
    with ThreadPoolExecutor(workers) as pool, progress(desc="decoding", total=len(paths), unit="img") as bar:
        for start in range(0, len(paths), block):  # in blocks, or the pool would run ahead into memory
            for image in pool.map(lambda path: transform(read_rgb(path)), paths[start : start + block]):
                if image.shape != first.shape or image.dtype != np.uint8:
                    raise ValueError(
                        f"{transform.name} gave {image.shape} {image.dtype}, expected {first.shape}"
                    )
                file.write(image.tobytes())
                bar.update()


def read_headers(paths: Sequence[Path]) -> np.ndarray:
    """int64 (n, 3): stored width, height, EXIF orientation; 0, 0, 0 of a damaged image. Memoised.

    Raises UserError for a file that the system does not give.
    """

    def compute() -> list[Any]:
        return threaded(_header, paths, desc="reading image sizes")

    return np.array(remember("headers 2", paths, compute), np.int64).reshape(-1, 3)


def _header(path: Path) -> list[int]:
    try:
        return with_image(path, lambda image, _: [*image.size, exif_orientation(image)])
    except DamagedImage:
        return [0, 0, 0]


def threaded(function: Callable[[Path], Any], paths: Sequence[Path], desc: str) -> list[Any]:
    """`function` of each path, in order, by threads, with a progress bar once it takes over two seconds."""
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(progress(pool.map(function, paths), desc=desc, total=len(paths), unit="img", delay=2))
