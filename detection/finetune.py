"""Fine-tune a backbone for object detection with SSD300 or Faster R-CNN, detect, score.

    python detection/finetune.py --backbone runs/cutmix/cutmix.pt --detector ssd300 --data voc:VOCDEVKIT
    python detection/finetune.py --backbone resnet50.pth --detector faster_rcnn --data voc:VOCDEVKIT --recipe paper

Without --data it uses the embedded world. The same command goes on where an interrupted one stopped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.backbone import Backbone, load_backbone
from common.cell import Run, add_backbone_arguments, open_run
from common.data import open_detection
from common.data.thumbnails import write_thumbnails
from common.engine import INIT, is_main, pick_device, torch_seed, train
from common.errors import run_main
from common.recipe import describe, label, override, parser
from detection.data import TrainViews
from detection.faster_rcnn import FasterRCNN, no_decay_on_biases
from detection.predict import predict, write_results
from detection.recipes import RECIPES, DetectionRecipe, FasterRCNNRecipe, SSDRecipe
from detection.report import finish, percent
from detection.ssd import SSD300, ssd_loss

TASK = "detection"


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data → backbone → training → predictions.json → scores, cell."""
    args = arguments().parse_args(argv)
    recipe = override(RECIPES[args.detector][args.recipe], args.set)
    spec = args.data or ("scenes:size=smoke" if args.recipe == "smoke" else "scenes")
    if not args.data:
        print(f"no --data: using the embedded world ({spec})")
    device = pick_device(args.device)
    train_set, test_set = open_detection(spec, args.limit or None, args.skip_bad)
    backbone = load_backbone(args.backbone, arch=args.arch, name=args.name, seed=args.seed)
    run = open_run(
        args.out,
        task=TASK,
        data=test_set.name,
        model=args.detector,
        recipe=recipe,
        recipe_label=label(args.recipe, args.set),
        backbone=backbone,
        seed=args.seed,
        train_fingerprint=train_set.fingerprint,
        test_fingerprint=test_set.fingerprint,
        limit=args.limit,
        restart=args.restart,
        skip_bad=len(train_set.skipped) + len(test_set.skipped),
    )
    if run.finished:
        print(f"finished already: {run.folder}")
        return 0
    for part, images in (("training", train_set), ("test", test_set)):
        for line in images.report:
            run.note(f"{part} data: {line}")
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
    made = parser(__doc__, RECIPES["ssd300"], default="tiny")
    made.epilog = "\n\n".join(f"{name}: {describe(recipes)}" for name, recipes in RECIPES.items())
    add_backbone_arguments(made)
    made.add_argument("--detector", default="ssd300", choices=list(RECIPES), help="(default: ssd300)")
    made.add_argument(
        "--data",
        metavar="KIND:PATH",
        help="voc:VOCDEVKIT[,year=2007+2012], voc:DIR with JPEGImages, Annotations and ImageSets, or scenes, "
        "the embedded world (default)",
    )
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
