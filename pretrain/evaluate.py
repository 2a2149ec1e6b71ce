"""Top-1 and top-5 of any checkpoint that has its classifier, with a report and a cell for the board.

    python pretrain/evaluate.py --backbone runs/cutmix/cutmix.pt --data folder:DIR
    python pretrain/evaluate.py --backbone torchvision:resnet50 --data folder:ILSVRC --name baseline
    python pretrain/evaluate.py --backbone pyramidnet.pt --data cifar100:DIR

A network of 1,000 ImageNet classes is scored on any folders named by their WordNet ids (timm must be installed);
another network's classes must be the data's: matched by the names in its file, else taken in order (--class-order) and
refused where another order fits far better. Without --data it uses the embedded world.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from backbench.common.backbones.checkpoint import read_checkpoint
from backbench.common.backbones.load import Backbone, load_classifier
from backbench.common.base.arguments import Parser, whole
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import digest, file_and_choice, fitting_name, write_npz
from backbench.common.base.recipe import label, override
from backbench.common.classify.crops import test_images
from backbench.common.classify.step import predict_logits
from backbench.common.data import open_classification
from backbench.common.engine import is_main, pick_device
from backbench.common.run.cell import Identity, open_run
from backbench.common.run.transfer import data_or_world, reading, reading_arguments
from backbench.pretrain.class_order import check_order, class_order_argument, match_classes, names_in
from backbench.pretrain.networks import NETWORKS, load_network
from backbench.pretrain.recipes import RECIPES
from backbench.pretrain.report import evaluate, finish


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe, data, classifier → predictions → report and cell."""
    args = arguments().parse_args(argv)
    recipe = override(RECIPES[args.recipe or "paper"], args.set)
    if recipe.precision not in ("auto", "fp32"):
        raise UserError(
            f"--set precision={recipe.precision}: it is training's, and nothing is trained here; "
            f"--set eval_precision={recipe.precision}"
        )
    device = pick_device(args.device)
    model, facts = load(args.backbone, **reading(args))
    recipe = as_the_file(recipe, facts, args)
    test_set = open_classification(data_or_world(args), args.limit or None, args.skip_bad)[1]
    order = match_classes(facts, test_set.classes, args.backbone, args.class_order)
    seed = facts.get("seed") or 0
    name = args.name or facts["method"].replace("/", "_")
    recipe_label = label("evaluate", [f"recipe={args.recipe}"] * bool(args.recipe) + args.set, recipe)
    place = (test_set.name, "classification", facts["arch"], recipe_label, name)
    run = open_run(
        args.out / Path(*map(fitting_name, (*place, f"seed{seed}"))),
        identity=Identity(
            *place,
            seed,
            **{"group": name, "method": facts["method"], "arch": facts["arch"], "limit": args.limit},
        ),
        task="classification",
        data=test_set.name,
        model=facts["arch"],
        recipe=recipe,
        recipe_label=recipe_label,
        backbone=as_backbone(args.backbone, model, facts, args.name),
        seed=seed,
        train_fingerprint=test_set.fingerprint,  # nothing is trained; rows of one column share it
        test_fingerprint=test_set.fingerprint,
        limit=args.limit,
        restart=args.restart,
        skip_bad=len(test_set.skipped),
        more={"score": order.key},
    )
    if run.finished:
        print(f"finished already: {run.folder}")
        return 0
    run.note_data([], test_set.report)
    for line in facts.get("report", []):
        run.note(line)
    if is_main():
        for line in facts.get("report", []):
            print(f"backbone: {line}")
        if not run.done("predict"):
            with run.stage("predict", files=["predictions.npz"]):
                images = test_images(test_set, recipe)
                logits = predict_logits(model, images, recipe, device, recipe.mean, recipe.std)
                write_npz(run.folder / "predictions.npz", ids=np.array(test_set.ids), logits=logits)
        with np.load(run.folder / "predictions.npz") as predictions:
            logits = predictions["logits"]
        names = names_of(order.index, test_set.classes, logits.shape[1])
        found = evaluate(logits, order.index[test_set.labels], test_set.ids, names)
        for line in check_order(order, logits.argmax(1), test_set.labels, args.backbone):
            run.note(line)
            print(f"note: {line}")
        finish(run, found, device, {}, described(args.backbone, facts, recipe))
        for metric, value in found["metrics"].items():
            print(f"{metric} {100 * value:.2f} %")
        print(f"→ {run.folder}")
    return 0


def arguments():
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--backbone",
        required=True,
        help="a checkpoint with its classifier (a file of pretrain/run.py, the official CutMix code, torchvision, "
        "timm …), torchvision:NAME or timm:NAME",
    )
    made.add_argument(
        "--data", metavar="KIND:PATH", help="folder:DIR, cifar10:DIR, cifar100:DIR … (default: scenes)"
    )
    made.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="the pretraining recipe whose test images to take (default: the file's own, else paper: short side "
        "256, central 224²)",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a recipe field: size=, resize=, resize_backend=, test_batch=, eval_precision= …; repeatable",
    )
    made.add_argument("--name", help="its name in results (default: the file's method, or its name)")
    made.add_argument("--out", type=Path, default=Path("results"), help="results folder (default: results)")
    made.add_argument("--limit", type=whole(), default=0, metavar="N", help="use only N test images")
    made.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU when there is one)")
    made.add_argument(
        "--skip-bad", action="store_true", help="leave unreadable images out, counted in the cell"
    )
    made.add_argument("--restart", action="store_true", help="throw away what the cell's folder holds")
    class_order_argument(made)
    reading_arguments(made)
    return made


def load(spec: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier and its facts: any ResNet of the field, or a CIFAR network of this project."""
    path = Path(file_and_choice(spec)[0]).expanduser()
    content = read_checkpoint(path) if path.is_file() else {}
    if isinstance(content, dict) and content.get("arch") in NETWORKS and "format" in content:
        return load_network(path)
    model, facts = load_classifier(spec, **options)
    if "classes" not in facts and (named := names_in(content, facts["num_classes"], spec)):
        facts["classes_from"], facts["classes"] = named
    return model, facts


def as_backbone(spec: str, model: nn.Module, facts: dict[str, Any], name: str | None = None) -> Backbone:
    """What a cell says of a whole classifier: the fingerprint is of all its weights and of how they read an image."""
    method, seed = facts["method"], facts.get("seed")
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    state = (part for k, v in model.state_dict().items() for part in (k, v.numpy().tobytes()))
    return Backbone(
        trunk=model,
        arch=facts["arch"],
        name=name or (f"{method}-p{seed}" if seed else method).replace("/", "_"),
        group=method if "run_id" in facts else name or method,
        method=method,
        fingerprint=digest(*state, mean, std, facts.get("stride_in_1x1", False)),
        source=spec,
        mean=mean,
        std=std,
        pretrain_seed=seed,
        report=facts.get("report", []),
    )


def as_the_file(recipe, facts: dict[str, Any], args):
    """The recipe with the normalisation of the file, and its test transform unless `--recipe` names another."""
    changes = {"mean": tuple(facts["mean"]), "std": tuple(facts["std"])}
    own = facts.get("recipe", {})
    if args.recipe is None and own:
        changes |= {k: own[k] for k in ("size", "resize", "crop") if k in own}
    given = {setting.partition("=")[0] for setting in args.set}
    changed = replace(recipe, **{k: v for k, v in changes.items() if k not in given})
    changed.check()
    return changed


def names_of(index: np.ndarray, classes: Sequence[str], count: int) -> list[str]:
    """A name for each of the network's classes: the data's, or its number."""
    known = dict(zip(index.tolist(), classes))
    return [known.get(i, f"class {i}") for i in range(count)]


def described(spec: str, facts: dict[str, Any], recipe) -> list[str]:
    """The report's lines on where the classifier came from and what it was shown."""
    lines = [
        f"Weights: {Path(spec).name if Path(spec).exists() else spec}, {facts['num_classes']} classes. Images: short "
        f"side {recipe.resize}, central {recipe.size}² ({recipe.resize_backend}); RGB/255 less "
        f"{', '.join(f'{v:.4g}' for v in recipe.mean)}, over {', '.join(f'{v:.4g}' for v in recipe.std)}."
    ]
    if facts.get("recipe_label"):
        lines += ["", f"Pretrained by recipe {facts['recipe_label']} on {facts.get('data')}."]
    return lines


if __name__ == "__main__":
    run_main(main)
