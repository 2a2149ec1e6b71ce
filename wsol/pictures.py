"""Pictures of maps and boxes: heat over the image, boxes, captions, sheets."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from backbench.common.base.errors import UserError
from backbench.common.base.files import write_atomic

RED, GREEN = (230, 30, 30), (40, 220, 60)  # true box, found box: the paper's figure 4
PAPER = 255  # background of a sheet
SIDE = 224  # height of a picture on a sheet
GAP, LINE = 6, 15  # pixels
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def fitted(image: np.ndarray, height: int = SIDE) -> np.ndarray:
    """An image uint8 (H, W, 3) at a height, its shape kept, but never wider than twice nor narrower than half of it."""
    width = round(np.clip(height * image.shape[1] / image.shape[0], height / 2, height * 2))
    shrinks = image.shape[0] > height
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def overlay(image: np.ndarray, shares: np.ndarray, window: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """Heat of a map (h, w) in [0, 1] over the part `window` (x0, y0, x1, y1 in shares) of an image: a new one."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = np.round(np.asarray(window) * (width, height, width, height)).astype(int)
    heat = cv2.resize(np.asarray(shares, np.float32), (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
    colour = cv2.applyColorMap((heat.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
    done = image.copy()
    part = done[y0:y1, x0:x1]
    part[:] = np.round((1 - strength) * part + strength * colour)
    return done


def draw_boxes(image: np.ndarray, boxes: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Outlines of boxes (k, 4) in shares, black-edged, on a new image. A box without area is left out."""
    height, width = image.shape[:2]
    done = Image.fromarray(image)
    pen = ImageDraw.Draw(done)
    for x0, y0, x1, y1 in np.round(np.asarray(boxes).reshape(-1, 4) * (width, height, width, height)).astype(
        int
    ):
        if x0 < x1 and y0 < y1:
            pen.rectangle((x0 - 1, y0 - 1, x1, y1), outline="black", width=4)
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
    return np.asarray(done)


def captioned(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """An image with lines of text below it, cut where they are wider than it."""
    height, width = image.shape[:2]
    done = Image.new("RGB", (width, height + LINE * len(lines) + 2), (PAPER,) * 3)
    done.paste(Image.fromarray(image))
    pen, font = ImageDraw.Draw(done), ImageFont.load_default(11)
    for number, line in enumerate(lines):
        text = line
        while pen.textlength(text, font=font) > width and len(text) > 2:
            text = text.rstrip("…")[:-1] + "…"
        pen.text((1, height + 1 + LINE * number), text, fill="black", font=font)
    return np.asarray(done)


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Pictures in rows, their columns aligned. Raises ValueError without any."""
    columns = max(len(row) for row in rows)
    widths = [max(row[c].shape[1] for row in rows if c < len(row)) for c in range(columns)]
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    done = np.full(
        (sum(heights) + GAP * (len(rows) + 1), sum(widths) + GAP * (columns + 1), 3), PAPER, np.uint8
    )
    y = GAP
    for row, height in zip(rows, heights):
        x = GAP
        for picture, width in zip(row, widths):
            done[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
            x += width + GAP
        y += height + GAP
    return done


def save_picture(path: Path, picture: np.ndarray) -> None:
    """Write a picture uint8 (H, W, 3) as PNG or JPEG, as the name says."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: pictures are written as .png or .jpg")
    write_atomic(path, lambda file: Image.fromarray(picture).save(file, kind, quality=90))
