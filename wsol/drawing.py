"""The best and the worst localised test images of a run, as one picture each."""

from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.data.types import ImageSet
from backbench.wsol.pictures import GREEN, RED, captioned, draw_boxes, fitted, overlay, save_picture, sheet

ACROSS = 3


def draw_extremes(
    path: Path,
    entries: list[dict[str, Any]],
    images: dict[str, np.ndarray],
    maps: np.ndarray,
    window: np.ndarray,
    test_set: ImageSet,
) -> None:
    """Write a sheet of the images of `entries`: the true class's map, the true boxes red, the found box green.

    maps (n, k, h, w), the true class's first; `images` holds "ids" of both; `window`: what of an image a map shows.
    """
    place = {str(name): i for i, name in enumerate(images["ids"])}
    tiles = []
    for entry in entries:
        i = place[entry["id"]]
        picture = overlay(fitted(test_set.read(i)), maps[i, 0].astype(np.float32), window)
        picture = draw_boxes(draw_boxes(picture, test_set.boxes[i], RED), np.array(entry["box"]), GREEN)
        tiles.append(
            captioned(picture, [entry["id"].rpartition("/")[2], f"{entry['class']}, IoU {entry['IoU']:.2f}"])
        )
    save_picture(path, sheet([tiles[start : start + ACROSS] for start in range(0, len(tiles), ACROSS)]))
