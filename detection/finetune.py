"""Fine-tune a backbone for object detection with SSD300 or Faster R-CNN, detect, score.

    python detection/finetune.py --backbone runs/cutmix/cutmix.pt --detector ssd300 --data voc:VOCDEVKIT
    python detection/finetune.py --backbone resnet50.pth --detector faster_rcnn --data voc:VOCDEVKIT --recipe paper

Without --data it uses the embedded world. The same command goes on where an interrupted one stopped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import common  # noqa: F401  first, before torch

# isort: split

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.backbone import Backbone
from common.cell import Run
from common.data import open_detection
from common.data.thumbnails import write_thumbnails
from common.engine import INIT, is_main, torch_seed, train
from common.errors import run_main
from common.recipe import describe, override
from common.transfer import open_transfer, transfer_parser
from detection.data import TrainViews
from detection.detect import predict
from detection.faster_rcnn import FasterRCNN, no_decay_on_biases
from detection.recipes import RECIPES, DetectionRecipe, FasterRCNNRecipe, SSDRecipe
from detection.report import finish, percent
from detection.results import write_results
from detection.ssd import SSD300, ssd_loss

TASK = "detection"


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data → backbone → training → predictions.json → scores, cell."""
    args = arguments().parse_args(argv)
    recipe = override(RECIPES[args.detector][args.recipe], args.set)
    opened = open_transfer(
        args, task=TASK, model=args.detector, recipe=recipe, settings=args.set, reader=open_detection
    )
    run, backbone, train_set, test_set = opened.run, opened.backbone, opened.train_set, opened.test_set
    if run.finished:
        return 0
    device = opened.device
    torch.manual_seed(torch_seed(INIT, args.seed))
    model = build(backbone, recipe, len(train_set.classes), run)
    cost = train(
        model,
        STEPS[args.detector](recipe),
        TrainViews(train_set, recipe, backbone.mean),
        recipe,
        folder=run.folder,
        key=run.keys["train"],
        seed=args.seed,
        device=device,
        groups=no_decay_on_biases(model) if isinstance(recipe, FasterRCNNRecipe) else None,
        workers=args.workers,
        desc=f"{args.detector} {backbone.name}",
    )
    if is_main():
        write_thumbnails(run.folder.parents[3], test_set.ids, test_set.paths, frames=test_set.sizes)
        if not run.done("predict"):
            with run.stage("predict", files=["predictions.json"]):
                found = predict(model, test_set, recipe, device)
                write_results(run.folder / "predictions.json", found, test_set.ids)
        metrics = finish(run, train_set, test_set, device, cost)
        print(f"mAP {percent(metrics['mAP'])} % → {run.folder}")
    return 0


def arguments():
    """The command line of this script."""
    data_help = "voc:VOCDEVKIT[,year=2007+2012], voc:DIR with JPEGImages, Annotations and ImageSets"
    made = transfer_parser(__doc__, RECIPES["ssd300"], data_help)
    made.epilog = "\n\n".join(f"{name}: {describe(recipes)}" for name, recipes in RECIPES.items())
    made.add_argument("--detector", default="ssd300", choices=list(RECIPES), help="(default: ssd300)")
    return made


def build(backbone: Backbone, recipe: DetectionRecipe, classes: int, run: Run) -> SSD300 | FasterRCNN:
    """The detector on the backbone's trunk, frozen as the recipe says; nothing is frozen of random weights."""
    trunk = backbone.trunk
    if not backbone.scratch:
        trunk.freeze(None if recipe.freeze == "none" else recipe.freeze)
        if recipe.freeze_bn:
            trunk.freeze_bn()
    elif recipe.freeze != "none" or recipe.freeze_bn:
        run.note(
            f"scratch: nothing is frozen and batch norm trains (the recipe freezes up to {recipe.freeze}"
            f"{' and all batch norm' if recipe.freeze_bn else ''}); no paired claim"
        )
    if isinstance(recipe, SSDRecipe):
        shape = (recipe.topology, recipe.l2norm, recipe.extra_width, recipe.extra_bn, recipe.head_std)
        return SSD300(trunk, classes, backbone.mean, backbone.std, *shape)
    return FasterRCNN(
        trunk,
        classes,
        backbone.mean,
        backbone.std,
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
    )


def ssd_step(recipe: SSDRecipe):
    """A training step of SSD300."""

    def step(model: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        offsets, logits = model(batch["images"])
        priors = getattr(model, "module", model).priors
        return ssd_loss(
            offsets, logits, batch["boxes"], batch["labels"], priors, recipe.match_iou, recipe.negatives
        )

    return step


def frcnn_step(recipe: FasterRCNNRecipe):
    """A training step of Faster R-CNN; its sampling draws from torch's generator, which the engine keys."""

    def step(model: nn.Module, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        targets = [{"boxes": b, "labels": k + 1} for b, k in zip(batch["boxes"], batch["labels"])]
        return model(batch["images"], batch["sizes"], targets)

    return step


STEPS = {"ssd300": ssd_step, "faster_rcnn": frcnn_step}


if __name__ == "__main__":
    run_main(main)
