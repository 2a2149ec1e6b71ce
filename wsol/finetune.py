"""Fine-tune a backbone for weakly supervised localisation: class labels only, boxes from class activation maps.

    python wsol/finetune.py --backbone runs/cutmix/cutmix.pt --data cub:CUB_200_2011
    python wsol/finetune.py --backbone resnet50.pth --data folder:DIR,boxes=FILE --recipe mini

Without --data it uses the embedded world. The same command goes on where an interrupted one stopped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from backbench.common.backbones.load import Backbone, load_backbone
from backbench.common.backbones.resnet import Classifier, normalise
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.progress import progress
from backbench.common.base.recipe import engine_options, override
from backbench.common.classify.crops import SQUARES, TrainImages
from backbench.common.classify.mixing import canonical_method, for_any_classifier
from backbench.common.classify.step import make_step
from backbench.common.data import open_localisation
from backbench.common.data.decode import Fit, centre_crop, decode_all
from backbench.common.data.thumbnails import write_thumbnails
from backbench.common.data.types import ImageSet
from backbench.common.engine import INIT, autocast, is_main, torch_seed, train
from backbench.common.metrics.classification import true_rank
from backbench.common.run.cell import Run
from backbench.common.run.transfer import open_transfer, reading, transfer_parser
from backbench.wsol.boxes import crop_window
from backbench.wsol.cam import ScoreMaps, compact, join, load_maps, predict
from backbench.wsol.model import write_model, wsol_model
from backbench.wsol.recipes import RECIPES, WSOLRecipe
from backbench.wsol.report import choose, finish

TASK, MODEL = "wsol", "cam"
OWN = "own"


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data → backbone → training → score maps → boxes, scores, cell."""
    args = arguments().parse_args(argv)
    settings = [*args.set, f"method={args.method}"] if args.method else args.set
    own = [f"method={own_method(args)}"] if args.method == OWN else []
    recipe = override(RECIPES[args.recipe], [*args.set, *own] if own else settings)

    def reader(*spec):
        sets = open_localisation(*spec)
        hold_out(sets[0], recipe)  # refused, if it is, before anything is written
        return sets

    opened = open_transfer(args, task=TASK, model=MODEL, recipe=recipe, settings=settings, reader=reader)
    run, backbone, train_set, test_set = opened.run, opened.backbone, opened.train_set, opened.test_set
    if run.finished:
        return 0
    device = opened.device
    kept, held_out = hold_out(train_set, recipe)
    torch.manual_seed(torch_seed(INIT, args.seed))
    model = wsol_model(backbone.trunk, len(train_set.classes))
    cost = train(
        model,
        make_step(recipe, len(train_set.classes), backbone.mean, backbone.std),
        TrainImages(kept, recipe),
        run.training,
        folder=run.folder,
        key=run.keys["train"],
        seed=args.seed,
        device=device,
        groups=[
            {"params": list(model.trunk.parameters()), "lr": 1.0},
            {"params": list(model.fc.parameters()), "lr": recipe.head_lr},
        ],
        **engine_options(args),
        desc=f"WSOL {backbone.name}",
    )
    if is_main():
        write_thumbnails(run.folder.parents[3], test_set.ids, test_set.paths, boxes=test_set.boxes)
        tested, held = predict_maps(run, model, backbone, test_set, held_out, device)
        threshold = choose(recipe, held, held_out)
        write_model(run, backbone, train_set.classes, threshold["value"])
        finish(run, tested, test_set, threshold, train_set, device, cost)
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    data_help = (
        "cub:DIR, ilsvrc:DIR, tiny_imagenet:DIR, folder:DIR,boxes=FILE (rows path,x0,y0,x1,y1 in shares)"
    )
    made = transfer_parser(__doc__, RECIPES, data_help)
    made.add_argument(
        "--method",
        type=lambda text: text if text == OWN else canonical_method(text),
        metavar="METHOD",
        help=f"how batches are mixed in this training: a sum of {', '.join(for_any_classifier())}; or own: "
        "as the backbone was pretrained, what the paper did (default: the recipe's, baseline)",
    )
    return made


def own_method(args: argparse.Namespace) -> str:
    """The method that the backbone was pretrained with; baseline for random weights."""
    backbone = load_backbone(args.backbone, name=args.name, seed=args.seed, **reading(args))
    if backbone.scratch:
        return "baseline"
    try:
        return canonical_method(backbone.method)
    except UserError:
        raise UserError(
            f"--method own: {args.backbone} does not say what it was pretrained with (found '{backbone.method}'); "
            f"give one of {', '.join(for_any_classifier())}"
        ) from None


def hold_out(train_set: ImageSet, recipe: WSOLRecipe) -> tuple[ImageSet, ImageSet | None]:
    """Split the images that choose the threshold off the training images: (trained on, held out).

    The held-out ones are a share of those with boxes, by hash of their ids: the same for every backbone and
    seed. Raises UserError when the threshold is to be chosen and no training image has a box.
    """
    if not recipe.holdout:
        return train_set, None
    rest, chosen = train_set.split(recipe.holdout, train_set.boxed)
    if not len(chosen):
        if recipe.threshold:
            return train_set, None
        raise UserError(
            f"{train_set.name}: {train_set.boxed.sum()} training images have boxes, too few to choose the threshold "
            "on; --set threshold=0.15 (the paper's)"
        )
    if not len(rest):
        raise UserError(
            f"recipe: holdout={recipe.holdout} leaves none of {len(train_set)} images to train on"
        )
    return rest, chosen


def predict_maps(
    run: Run,
    model: Classifier,
    backbone: Backbone,
    test_set: ImageSet,
    held_out: ImageSet | None,
    device: torch.device,
) -> tuple[tuple[ScoreMaps, dict], tuple[ScoreMaps, dict] | None]:
    """The predict stage: `scoremaps.npz` of the test images and `scoremaps_held_out.npz`, written or read back.

    Beside the maps each holds "rank" (n,) of the true class, "logits" float32 (n, k) of the maps' classes and
    "window" (4,): the part of the image that the maps cover, in shares.
    """
    parts = {"scoremaps.npz": test_set} | ({"scoremaps_held_out.npz": held_out} if held_out else {})
    if not run.done("predict"):
        with run.stage("predict", files=list(parts)):
            for file, images in parts.items():
                maps, more = image_maps(model, images, run.recipe, device, backbone.mean, backbone.std)
                maps.save(run.folder / file, **more)
    loaded = [load_maps(run.folder / file) for file in parts]
    return loaded[0], loaded[1] if held_out else None


@torch.inference_mode()
def image_maps(
    model: Classifier, images: ImageSet, recipe: WSOLRecipe, device: torch.device, mean, std
) -> tuple[ScoreMaps, dict[str, np.ndarray]]:
    """Maps of every image's centre crop (the image squeezed to resize², its central size² kept); see above."""
    model.to(device).eval()
    ids, parts, ranks, logits_of_maps = np.array(images.ids), [], [], []
    batches = square_batches(images, recipe)
    steps = -(-len(images) // recipe.test_batch)
    for now, squares in progress(batches, total=steps, desc="score maps", unit="batch", delay=2):
        crops = np.stack([centre_crop(image, (recipe.size, recipe.size)) for image in squares])
        labels = torch.from_numpy(images.labels[now]).to(device)
        with autocast(recipe.eval_precision, device):
            features = model.trunk(normalise(torch.from_numpy(crops).to(device), mean, std))
        logits, classes, maps = predict(model, features, labels, recipe.top)
        ranks.append(true_rank(logits.cpu().numpy(), images.labels[now]))
        logits_of_maps.append(logits.gather(1, classes).cpu().numpy())
        parts.append(compact(ids[now], classes.cpu().numpy(), maps.cpu().numpy()))
    more = {
        "rank": np.concatenate(ranks),
        "logits": np.concatenate(logits_of_maps),
        "window": crop_window(recipe.resize, recipe.size),
    }
    return join(parts), more


def square_batches(images: ImageSet, recipe: WSOLRecipe) -> Iterator[tuple[slice, Iterable[np.ndarray]]]:
    """The images squeezed to resize², `test_batch` at a time.

    From the decoded cache, or from the files where the recipe or the set's size says so (`cache`).
    """
    side = recipe.resize
    fit = Fit(side, side, backend=recipe.resize_backend)
    slices = [
        slice(start, min(start + recipe.test_batch, len(images)))
        for start in range(0, len(images), recipe.test_batch)
    ]
    if recipe.cache != "file" and (recipe.cache == "square" or len(images) * side * side * 3 <= SQUARES):
        squares = decode_all(images.paths, fit)
        yield from ((now, squares[now]) for now in slices)
        return
    with ThreadPoolExecutor() as pool:

        def read(now: slice) -> list:
            return [pool.submit(lambda i=i: fit(images.read(i))) for i in range(now.start, now.stop)]

        ahead = read(slices[0])  # the next batch is read while this one is predicted
        for now, after in zip(slices, [*slices[1:], slice(0, 0)]):
            current, ahead = ahead, read(after)
            yield now, [image.result() for image in current]


if __name__ == "__main__":
    run_main(main)
