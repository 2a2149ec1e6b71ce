"""The scores of a detection cell: VOC's average precision, and COCO's where its marks were kept."""

from collections.abc import Mapping

import numpy as np

from backbench.common.metrics import average_precision, coco


def rescore(images: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`mAP` (11-point) and `mAP_area` at IoU .5, and, given `coco_mark`, `AP`, `AP50`, `AP75`; each (R,).

    `images` is `average_precision.match`'s, with `coco_mark` int8 (detections, 1, thresholds) in the same order.
    """
    found = average_precision.rescore(images, weights)
    if "coco_mark" not in images:
        return found
    return found | coco.rescore({**images, "coco_positives": images["positives"][..., None]}, weights)
