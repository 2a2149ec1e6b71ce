"""A detector from its recipe, and what a run folder keeps of it so that it can be built again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbench.common.backbones.load import Backbone, read_checkpoint
from backbench.common.backbones.resnet import ARCHS, Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_json
from backbench.common.base.recipe import to_json
from backbench.detection.faster_rcnn import FasterRCNN
from backbench.detection.recipes import DetectionRecipe, FasterRCNNRecipe, SSDRecipe
from backbench.detection.ssd import SSD300

FORMAT = "backbench-detector-1"
KINDS = {"ssd300": SSDRecipe, "faster_rcnn": FasterRCNNRecipe}


def make_model(
    trunk: Trunk, recipe: DetectionRecipe, classes: int, mean: Sequence[float], std: Sequence[float]
) -> SSD300 | FasterRCNN:
    """The recipe's detector on a trunk. `mean` and `std` normalise RGB/255."""
    if isinstance(recipe, SSDRecipe):
        shape = (recipe.topology, recipe.l2norm, recipe.extra_width, recipe.extra_bn, recipe.head_std)
        return SSD300(trunk, classes, mean, std, *shape)
    return FasterRCNN(
        trunk,
        classes,
        mean,
        std,
        neck=recipe.neck,
        anchors=recipe.anchors,
        roi_size=recipe.roi_size,
        sampling=recipe.sampling,
        rpn_batch=recipe.rpn_batch,
        roi_batch=recipe.roi_batch,
        proposals_before=(recipe.proposals_before, recipe.test_proposals_before),
        proposals_after=(recipe.proposals_after, recipe.test_proposals_after),
        score=recipe.score,
        nms=recipe.nms,
        top=recipe.top,
        head_bn=recipe.head_bn,
        fpn_width=recipe.fpn_width,
        head_width=recipe.head_width,
    )


def write_facts(
    folder: Path,
    detector: str,
    backbone: Backbone,
    classes: Sequence[str],
    recipe: DetectionRecipe,
    category_ids: Sequence[int] | None = None,
) -> None:
    """Write model.json: beside weights.pt all that `load_detector` needs, and what predictions.json numbers."""
    facts = {
        "detector": detector,
        "arch": backbone.arch,
        "stride_in_1x1": backbone.stride_in_1x1,
        "classes": list(classes),
        **({"category_ids": list(category_ids)} if category_ids else {}),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
    write_json(folder / "model.json", {"format": FORMAT, **facts, "recipe": to_json(recipe)})


def load_detector(folder: Path) -> tuple[SSD300 | FasterRCNN, DetectionRecipe, list[str]]:
    """The trained model of a run folder, its recipe and its classes.

    Raises UserError when the folder holds no finished training, or one without model.json or of another format.
    """
    if not (folder / "weights.pt").is_file():
        below = sorted(folder.rglob("weights.pt"))[:1] if folder.is_dir() else []
        hint = f"; did you mean {below[0].parent}?" if below else "; give the folder of a finished training"
        raise UserError(f"--run {folder}: no weights.pt in it{hint}")
    if not (folder / "model.json").is_file():
        raise UserError(
            f"--run {folder}: no model.json in it (an older version trained it); "
            "run its detection/finetune.py command once more with --eval-only, which writes it"
        )
    facts = read_json(folder / "model.json")
    if facts.get("format") != FORMAT or facts["detector"] not in KINDS or facts["arch"] not in ARCHS:
        raise UserError(
            f"{folder / 'model.json'}: not of format {FORMAT} but {facts.get('format')}: give a run of "
            "detection/finetune.py, or train it again"
        )
    recipe = _recipe(KINDS[facts["detector"]], facts["recipe"], folder / "model.json")
    trunk = Trunk(facts["arch"], facts.get("stride_in_1x1", False))
    model = make_model(trunk, recipe, len(facts["classes"]), facts["mean"], facts["std"])
    try:
        model.load_state_dict(read_checkpoint(folder / "weights.pt")["model"])
    except (RuntimeError, KeyError, TypeError):
        raise UserError(f"{folder / 'weights.pt'}: not the weights of its model.json; train again") from None
    return model, recipe, facts["classes"]


def _recipe(kind: type[DetectionRecipe], values: dict[str, Any], path: Path) -> DetectionRecipe:
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{path}: recipe fields {', '.join(unknown)} are unknown here: update backbench")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
