"""Fine-tune a backbone for object detection with SSD300 or Faster R-CNN, detect, score.

    python detection/finetune.py --backbone runs/cutmix/cutmix.pt --detector ssd300 --data voc:VOCDEVKIT
    python detection/finetune.py --backbone resnet50.pth --detector faster_rcnn --data voc:VOCDEVKIT --recipe paper

Without --data it uses the embedded world. The same command goes on where an interrupted one stopped; with --eval-only
it detects and scores again. detection/predict.py draws what a finished run finds in other pictures.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbench.common.backbones.load import Backbone
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.recipe import describe, engine_options, override
from backbench.common.data import DetectionSet, open_detection
from backbench.common.data.thumbnails import write_thumbnails
from backbench.common.engine import INIT, is_main, torch_seed, train, world
from backbench.common.run.cell import Run
from backbench.common.run.transfer import open_transfer, transfer_parser
from backbench.detection.build import make_model, write_facts
from backbench.detection.data import TrainViews, class_notes
from backbench.detection.detect import predict
from backbench.detection.faster_rcnn import FasterRCNN, parameter_groups, synchronise_batch_norm
from backbench.detection.recipes import RECIPES, DetectionRecipe, FasterRCNNRecipe, SSDRecipe
from backbench.detection.report import finish
from backbench.detection.results import write_results
from backbench.detection.scores import cell_statistics, percent, scores
from backbench.detection.ssd import SSD300, ssd_loss

TASK = "detection"


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data → backbone → training → predictions.json → scores, cell."""
    args = arguments().parse_args(argv)
    if args.compile and args.detector == "faster_rcnn":
        raise UserError(
            "--compile: Faster R-CNN's shapes change from image to image; leave it out, or use ssd300"
        )
    if args.every < 0:
        raise UserError(f"--every {args.every}: give a number of iterations, or 0 for no scores on the way")
    if args.recipe not in RECIPES[args.detector]:
        raise UserError(f"--recipe {args.recipe}: {args.detector} has {', '.join(RECIPES[args.detector])}")
    named = RECIPES[args.detector][args.recipe]
    recipe, line = scale_rate(named, override(named, args.set), args.set)
    opened = open_transfer(
        args, task=TASK, model=args.detector, recipe=recipe, settings=args.set, reader=open_detection
    )
    run, backbone, train_set, test_set = opened.run, opened.backbone, opened.train_set, opened.test_set
    notes = [*class_notes(train_set, test_set), *([line] if line else [])]
    for note in notes:
        run.note(note)
    trained = (run.folder / "weights.pt").exists()
    if args.eval_only and not trained:
        raise UserError(f"--eval-only: {run.folder} holds no finished training; run without it first")
    if run.finished and not args.eval_only:
        return 0
    device = opened.device
    torch.manual_seed(torch_seed(INIT, args.seed))
    model = build(backbone, recipe, len(train_set.classes), run, device)
    if is_main():
        for note in notes:
            print(f"note: {note}")
        write_facts(run.folder, args.detector, backbone, train_set.classes, recipe, train_set.categories)
    cost = train(
        model,
        STEPS[args.detector](recipe),
        TrainViews(train_set, recipe, backbone.mean, trained),
        run.training,
        folder=run.folder,
        key=run.keys["train"],
        seed=args.seed,
        device=device,
        groups=parameter_groups(model, recipe.decay_biases) if isinstance(recipe, FasterRCNNRecipe) else None,
        **engine_options(args),
        desc=f"{args.detector} {backbone.name}",
        evaluate=evaluation(test_set, recipe, device) if args.every else None,
        every=args.every,
    )
    if is_main():
        known = {"frames": test_set.sizes, "boxes": test_set.boxes}
        write_thumbnails(run.folder.parents[3], test_set.ids, test_set.paths, **known)
        if args.eval_only or not run.done("predict"):
            with run.stage("predict", files=["predictions.json"]):
                found = predict(model, test_set, recipe, device)
                write_results(run.folder / "predictions.json", found, test_set.ids, test_set.categories)
        metrics = finish(run, train_set, test_set, device, cost)
        print(f"mAP {percent(metrics['mAP'])} % → {run.folder}")
    return 0


def arguments():
    """The command line of this script."""
    data_help = (
        "voc:VOCDEVKIT[,year=2007+2012], voc:DIR with JPEGImages, Annotations and ImageSets, "
        "coco:images=DIR,train=A.json,val=B.json"
    )
    names = [name for recipes in RECIPES.values() for name in recipes]
    made = transfer_parser(__doc__, dict.fromkeys(names, RECIPES["ssd300"]["tiny"]), data_help)
    made.epilog = "\n\n".join(f"{name}: {describe(recipes)}" for name, recipes in RECIPES.items())
    made.add_argument("--detector", default="ssd300", choices=list(RECIPES), help="(default: ssd300)")
    made.add_argument(
        "--eval-only",
        action="store_true",
        help="detect and score again with the weights of a finished training",
    )
    made.add_argument(
        "--every",
        type=int,
        default=0,
        metavar="N",
        help="score the test images every N iterations, in log.jsonl",
    )
    return made


def scale_rate(
    named: DetectionRecipe, recipe: DetectionRecipe, settings: list[str]
) -> tuple[DetectionRecipe, str]:
    """The recipe with its rate scaled as its batch was (Goyal et al., 2017) unless `lr` was set, and a line saying so.

    The length stays as it is: iterations are iterations. Without a change the line is empty.
    """
    if recipe.batch == named.batch or any(setting.partition("=")[0] == "lr" for setting in settings):
        return recipe, ""
    lr = named.lr * recipe.batch / named.batch
    line = f"batch {named.batch} → {recipe.batch}: lr scaled with it, {named.lr:g} → {lr:g} (--set lr=… overrides)"
    return replace(recipe, lr=lr), line


def evaluation(test_set: DetectionSet, recipe: DetectionRecipe, device: torch.device):
    """A measurement for the log: mAP of the test images. The run ends with the last weights, whatever it shows."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        stats = cell_statistics(predict(model, test_set, recipe, device), test_set)
        return {name: value for name, value in scores(stats).items() if value is not None}

    return evaluate


def build(
    backbone: Backbone, recipe: DetectionRecipe, classes: int, run: Run, device: torch.device
) -> SSD300 | FasterRCNN:
    """The detector on the backbone's trunk, frozen as the recipe says; nothing is frozen of random weights.

    With `head_bn` batch norm is synchronised among processes on GPUs, and it is noted how many images it sees.
    """
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
    model = make_model(trunk, recipe, classes, backbone.mean, backbone.std)
    if isinstance(recipe, FasterRCNNRecipe) and recipe.head_bn:
        seen = recipe.micro_batch or recipe.batch
        if device.type == "cuda" and world() > 1:
            synchronise_batch_norm(model)
            seen *= world()
        if seen < recipe.batch:
            run.note(
                f"batch norm sees {seen} images at once, not the {recipe.batch} of a batch as the protocol's "
                "synchronised one does: gradients are accumulated, statistics are not"
            )
    return model


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
