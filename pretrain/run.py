"""Pretrain a classifier by any method of the CutMix paper and write its backbone file.

    python pretrain/run.py --method cutmix --data folder:DIR --out runs/cutmix     writes runs/cutmix/cutmix.pt
    python pretrain/run.py --method cutout+mixup --arch pyramidnet200 --recipe paper_cifar --data cifar100:DIR
    torchrun --nproc-per-node 4 pretrain/run.py --recipe paper --method cutmix --data folder:ILSVRC

Without --data it trains on the embedded world. The same command goes on where an interrupted one stopped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbench.common.backbones.load import save_backbone
from backbench.common.backbones.resnet import ARCHS
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import write_npz
from backbench.common.base.recipe import engine_options, label, override, parser, to_json
from backbench.common.classify.crops import TrainImages, test_images
from backbench.common.classify.mixing import METHODS
from backbench.common.classify.step import make_step, predict_logits
from backbench.common.data import open_classification
from backbench.common.data.types import ImageSet
from backbench.common.engine import INIT, is_main, pick_device, torch_seed, train
from backbench.common.engine.state import read_state
from backbench.common.metrics.classification import true_rank
from backbench.common.run.cell import Identity, Run, open_run
from backbench.common.run.transfer import data_or_world
from backbench.pretrain.networks import ALL_ARCHS, build
from backbench.pretrain.recipes import RECIPES, PretrainRecipe
from backbench.pretrain.regularizers import fold, install
from backbench.pretrain.report import evaluate, finish


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data, model → training → predictions → backbone file and cell."""
    args = arguments().parse_args(argv)
    recipe = override(replace(RECIPES[args.recipe], method=args.method), args.set)
    arch = args.arch or default_arch(args.recipe)
    if (recipe.micro_batch or recipe.batch) == 1 and arch in ARCHS and recipe.size <= 32:
        raise UserError(
            f"recipe: a micro-batch of 1 image of {recipe.size} pixels leaves {arch}'s last batch norm one value a "
            "channel; --set batch=2 or more, or --set size=64"
        )
    device = pick_device(args.device)
    train_set, test_set = open_classification(data_or_world(args), args.limit or None, args.skip_bad)
    kept, held_out = hold_out(train_set, recipe.val_share)
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
        trained_on=device,
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
    if is_main():
        for note in run.notes:
            print(f"note: {note}")
    torch.manual_seed(torch_seed(INIT, args.seed))
    model = build(arch, len(train_set.classes))
    hooks = install(model, recipe)
    cost = train(
        model,
        hooks.wrap(make_step(recipe, len(train_set.classes), recipe.mean, recipe.std)),
        TrainImages(kept, recipe),
        run.training,
        folder=run.folder,
        key=run.keys["train"],
        seed=args.seed,
        device=device,
        desc=f"pretraining {recipe.method}",
        **engine_options(args),
        **evaluation(held_out, recipe, device, len(kept)),
    )
    hooks.remove()
    if is_main():
        fold(model, recipe)
        Ending(run, model, train_set, test_set, device, cost).write(file)
    return 0


def arguments():
    """The command line of this script."""
    made = parser(__doc__, RECIPES, default="tiny")
    made.add_argument(
        "--method",
        default="baseline",
        help=f"one of {', '.join(METHODS)}, or a sum such as cutout+mixup (default: baseline)",
    )
    made.add_argument(
        "--arch",
        choices=ALL_ARCHS,
        metavar="NETWORK",
        help=f"{', '.join(ALL_ARCHS)} (default: the recipe's: resnet18_half for tiny and smoke, pyramidnet200 and "
        "resnet110 for CIFAR, else resnet50)",
    )
    made.add_argument(
        "--data",
        metavar="KIND:PATH",
        help="folder:DIR with train/CLASS/… and val/CLASS/…, ilsvrc:DIR, tiny_imagenet:DIR, cifar10:DIR, "
        "cifar100:DIR, cub:DIR, or scenes, the embedded world (default)",
    )
    made.add_argument(
        "--out", type=Path, help="run folder; the backbone file is OUT/METHOD.pt (default: runs/METHOD)"
    )
    return made


def default_arch(recipe: str) -> str:
    """The network that a named recipe was made for."""
    known = {"smoke": "resnet18_half", "tiny": "resnet18_half", "paper_cifar": "pyramidnet200"}
    return {**known, "paper_cifar_resnet110": "resnet110"}.get(recipe, "resnet50")


def hold_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet | None]:
    """Split `share` of the training images off, by hash of their ids: (trained on, held out)."""
    if not share:
        return images, None
    kept, held_out = images.split(share)
    if not len(kept) or not len(held_out):
        raise UserError(f"recipe: val_share={share} of {len(images)} images leaves none on one side")
    return kept, held_out


def evaluation(
    held_out: ImageSet | None, recipe: PretrainRecipe, device: torch.device, images: int
) -> dict[str, Any]:
    """The arguments with which `train` keeps the best weights by top-1 of the held-out images."""
    if held_out is None:
        return {}

    measured = replace(
        recipe, eval_precision="fp32"
    )  # the best weights are no matter of a later stage's field

    def top1(model: nn.Module) -> dict[str, float]:
        logits = predict_logits(
            model, test_images(held_out, recipe), measured, device, recipe.mean, recipe.std
        )
        return {"top-1": float((true_rank(logits, held_out.labels) == 0).mean())}

    every = max(1, round(recipe.eval_every * images / recipe.batch)) if recipe.eval_every else 0
    return {"evaluate": top1, "every": every, "best": "top-1"}


class Ending:
    """What follows a training: predictions, backbone files, report, cell."""

    def __init__(self, run: Run, model: nn.Module, train_set, test_set, device, cost) -> None:
        self.run, self.model, self.train_set, self.test_set = run, model, train_set, test_set
        self.device, self.cost, self.recipe = device, cost, run.recipe

    def write(self, file: Path) -> None:
        """Predict with the last weights (and the best, if kept), write backbone files, report and cell."""
        best = self.run.folder / "best.pt" if self.recipe.val_share else None
        if not self.run.done("predict"):
            files = ["predictions.npz"] + (["predictions_best.npz"] if best else [])
            with self.run.stage("predict", files=files):
                self._predict("predictions.npz")
                if best:
                    with self._holding(self._best(best)["model"]):
                        self._predict("predictions_best.npz")
        found = self._evaluate("predictions.npz")
        lines = [
            f"Recipe {self.run.identity.recipe}; {self.cost['iterations']} iterations, "
            f"{self.cost['seconds']:.0f} s of training. The scores are of the last iteration."
        ]
        names = [file.name]
        with self.run.stage("score", files=names):
            self._save(file, found["metrics"], self.cost["images"] / len(self.train_set))
            if best:
                names.append(f"{file.stem}_best.pt")
                lines.append(self._save_best(best, file.with_name(names[-1])))
        finish(self.run, found, self.device, self.cost, lines)
        top1, chance = 100 * found["metrics"]["top-1"], 100 * found["chance"]["top-1"]
        print(f"top-1 {top1:.1f} % (chance {chance:.1f}) → {file}")

    def _predict(self, name: str) -> None:
        images, recipe = test_images(self.test_set, self.recipe), self.recipe
        logits = predict_logits(self.model, images, recipe, self.device, recipe.mean, recipe.std)
        write_npz(self.run.folder / name, ids=np.array(self.test_set.ids), logits=logits)

    def _evaluate(self, name: str) -> dict[str, Any]:
        with np.load(self.run.folder / name) as predictions:
            logits = predictions["logits"]
        images = self.test_set
        return evaluate(logits, images.labels, images.ids, images.classes)

    def _save(self, file: Path, metrics: dict[str, float], epoch: float) -> None:
        identity, recipe = self.run.identity, self.recipe
        save_backbone(
            file,
            self.model,
            arch=identity.arch,
            num_classes=len(self.test_set.classes),
            classes=list(self.test_set.classes),
            method=recipe.method,
            recipe=to_json(recipe),
            recipe_label=identity.recipe,
            seed=identity.seed,
            data=self.train_set.name,
            data_fingerprint=self.train_set.fingerprint,
            run_id=self.run.keys["train"],
            epoch=round(epoch, 4),
            metrics=metrics,
            mean=list(recipe.mean),
            std=list(recipe.std),
            size=recipe.size,
        )

    def _save_best(self, best: Path, file: Path) -> str:
        """The best weights' backbone file; returns the report's line about them."""
        state = self._best(best)
        metrics = self._evaluate("predictions_best.npz")["metrics"]
        epoch = state["iteration"] * self.recipe.batch / len(self.train_set)
        with self._holding(state["model"]):
            self._save(file, metrics, epoch)
        return (
            f"Best of the evaluated iterations by {100 * self.recipe.val_share:g} % of the training images: "
            f"{state['iteration']} (there top-1 {100 * state['value']:.2f}; here {100 * metrics['top-1']:.2f}), "
            f"kept as {file.name}, never ranked."
        )

    def _best(self, path: Path) -> dict[str, Any]:
        return read_state(path, self.run.keys["train"], "cpu")

    @contextmanager
    def _holding(self, trained: dict[str, Tensor]) -> Iterator[None]:
        """The model with other trained weights for a while."""
        own = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(trained)
        fold(self.model, self.recipe)
        yield
        self.model.load_state_dict(own)


if __name__ == "__main__":
    run_main(main)
