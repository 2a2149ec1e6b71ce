"""Pretrain a classifier with baseline, Mixup, Cutout or CutMix and write its backbone file.

    python pretrain/run.py --method cutmix --data folder:DIR --out runs/cutmix     writes runs/cutmix/cutmix.pt

Without --data it trains on the embedded world. The same command goes on where an interrupted one stopped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import common  # noqa: F401  first, before torch

# isort: split

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.backbone import IMAGENET_MEAN, IMAGENET_STD, save_backbone
from common.cell import Identity, Run, open_run
from common.classify import make_step, predict_logits
from common.crops import TrainImages, test_images
from common.data import open_classification
from common.data.types import ImageSet
from common.engine import INIT, SPLIT, is_main, pick_device, stream, torch_seed, train
from common.errors import run_main
from common.files import write_npz
from common.metrics import rescore
from common.metrics.classification import true_rank
from common.mixing import METHODS
from common.recipe import label, override, parser, to_json
from common.transfer import data_or_world
from common.trunk import ARCHS, Classifier, Trunk
from pretrain.recipes import RECIPES


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data, model → training → predictions → backbone file and cell."""
    args = arguments().parse_args(argv)
    recipe = override(replace(RECIPES[args.recipe], method=args.method), args.set)
    arch = args.arch or ("resnet18_half" if args.recipe in ("smoke", "tiny") else "resnet50")
    device = pick_device(args.device)
    train_set, test_set = open_classification(data_or_world(args), args.limit or None, args.skip_bad)
    name = label(args.recipe, args.set, recipe)
    identity = Identity(
        *(train_set.name, "classification", arch, name, recipe.method, args.seed),
        **{"group": recipe.method, "method": recipe.method, "arch": arch, "limit": args.limit},
    )
    run = open_run(
        args.out or Path("runs") / recipe.method,
        identity=identity,
        task="classification",
        data=train_set.name,
        model=arch,
        recipe=recipe,
        recipe_label=name,
        backbone=None,
        seed=args.seed,
        train_fingerprint=train_set.fingerprint,
        test_fingerprint=test_set.fingerprint,
        limit=args.limit,
        restart=args.restart,
        skip_bad=len(train_set.skipped) + len(test_set.skipped),
    )
    file = run.folder / f"{recipe.method}.pt"
    if run.finished and file.exists():
        print(f"finished already: {file}")
        return 0
    run.note_data(train_set.report, test_set.report)
    torch.manual_seed(torch_seed(INIT, args.seed))
    model = Classifier(Trunk(arch), len(train_set.classes))
    cost = train(
        model,
        make_step(recipe, len(train_set.classes), IMAGENET_MEAN, IMAGENET_STD),
        TrainImages(train_set, recipe),
        recipe,
        folder=run.folder,
        key=run.keys["train"],
        seed=args.seed,
        device=device,
        workers=args.workers,
        desc=f"pretraining {recipe.method}",
    )
    if is_main():
        _predict(run, model, test_set, device)
        _score(run, model, train_set, test_set, device, cost, file)
    return 0


def arguments():
    """The command line of this script."""
    made = parser(__doc__, RECIPES, default="tiny")
    made.add_argument(
        "--method", default="baseline", choices=METHODS, help="how batches are mixed (default: baseline)"
    )
    made.add_argument(
        "--arch", choices=list(ARCHS), help="network (default: resnet50; resnet18_half for tiny and smoke)"
    )
    made.add_argument(
        "--data",
        metavar="KIND:PATH",
        help="folder:DIR with train/CLASS/… and val/CLASS/…, cub:DIR, or scenes (default: scenes, the embedded world)",
    )
    made.add_argument(
        "--out", type=Path, help="run folder; the backbone file is OUT/METHOD.pt (default: runs/METHOD)"
    )
    return made


def _predict(run: Run, model: Classifier, test_set: ImageSet, device: torch.device) -> None:
    if run.done("predict"):
        return
    with run.stage("predict", files=["predictions.npz"]):
        logits = predict_logits(
            model, test_images(test_set, run.recipe), run.recipe, device, IMAGENET_MEAN, IMAGENET_STD
        )
        write_npz(run.folder / "predictions.npz", ids=np.array(test_set.ids), logits=logits)


def _score(run: Run, model, train_set: ImageSet, test_set: ImageSet, device, cost, file: Path) -> None:
    with np.load(run.folder / "predictions.npz") as predictions:
        logits = predictions["logits"]
    rank = true_rank(logits, test_set.labels)
    images = {
        "ids": np.array(test_set.ids),
        "rank": rank.astype(np.int16),
        "num_classes": np.array(logits.shape[1]),
    }
    metrics = {k: float(v[0]) for k, v in rescore("classification", images).items()}
    shuffled = stream(SPLIT, 0).permutation(len(logits))
    chance_images = {**images, "rank": true_rank(logits[shuffled], test_set.labels)}
    chance = {k: float(v[0]) for k, v in rescore("classification", chance_images).items()}
    with run.stage("score", files=[file.name]):
        save_backbone(
            file,
            model,
            arch=run.identity.arch,
            num_classes=len(test_set.classes),
            classes=list(test_set.classes),
            method=run.recipe.method,
            recipe=to_json(run.recipe),
            recipe_label=run.identity.recipe,
            seed=run.identity.seed,
            data=train_set.name,
            data_fingerprint=train_set.fingerprint,
            run_id=run.keys["train"],
            epoch=round(cost["images"] / len(train_set), 4),
            metrics=metrics,
            mean=list(IMAGENET_MEAN),
            std=list(IMAGENET_STD),
            size=run.recipe.size,
        )
    per_class = {
        c: float((rank[test_set.labels == i] == 0).mean())
        for i, c in enumerate(test_set.classes)
        if (test_set.labels == i).any()
    }
    run.finish(
        metrics=metrics,
        chance=chance,
        primary="top-1",
        images=images,
        report={"metrics": metrics, "chance": chance, "top-1 by class": per_class},
        report_md=_report(run, metrics, chance, per_class, cost),
        device=device,
        cost=cost,
    )
    print(f"top-1 {100 * metrics['top-1']:.1f} % (chance {100 * chance['top-1']:.1f}) → {file}")


def _report(run: Run, metrics, chance, per_class, cost) -> str:
    lines = [
        f"# Pretraining {run.identity.method}: {run.identity.arch} on {run.identity.data}, seed {run.identity.seed}",
        "",
        "| metric | score | chance |",
        "|---|---|---|",
        *(f"| {name} | {100 * value:.2f} | {100 * chance[name]:.2f} |" for name, value in metrics.items()),
        "",
        f"Recipe {run.identity.recipe}; {cost['iterations']} iterations, {cost['seconds']:.0f} s of training. "
        "Chance: the same predictions, shuffled over the images.",
        "",
        "| class | top-1 |",
        "|---|---|",
        *(
            f"| {name} | {100 * value:.1f} |"
            for name, value in sorted(per_class.items(), key=lambda item: item[1])[:50]
        ),
        "",
        *(f"- {line}" for line in run.notes),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
