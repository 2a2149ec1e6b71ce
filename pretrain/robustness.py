"""Robustness and uncertainty of trained classifiers (the paper's section 4.4): four tests, a cell for each.

    python pretrain/robustness.py --backbone runs/baseline/baseline.pt runs/cutmix/cutmix.pt --data folder:DIR
    python pretrain/robustness.py --backbone torchvision:resnet50 --data folder:ILSVRC --tests fgsm --recipe paper
    python pretrain/robustness.py --backbone pyramidnet.pt --data cifar100:DIR --tests ood \\
        --ood uniform gaussian isun=folder:iSUN tiny_imagenet_crop=folder:tiny-imagenet-200/test,crop

fgsm       top-1 after the fast gradient sign attack (Table 11)
occlusion  top-1 with a growing hole in the centre, and with all but it hidden (Figure 5a)
between    one of the two classes predicted for Mixup and CutMix of pairs of test images (Figure 5b)
ood        other images told by the largest softmax probability: AUROC, TNR at 95 % TPR, detection accuracy (Table 12)

Figures are shares of what is right, so that higher is better; the report's curves are errors, as the paper's. Test
images are sized and normalised as the file says. Without --data it uses the embedded world.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from backbench.common.backbones.load import Backbone
from backbench.common.base.arguments import Parser, whole
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import digest, read_json, write_json, write_npz
from backbench.common.base.recipe import describe, label, override
from backbench.common.classify.crops import test_images
from backbench.common.data import open_classification
from backbench.common.data.pictures import write_jpeg
from backbench.common.data.types import ImageSet
from backbench.common.engine import is_main, pick_device
from backbench.common.run.cell import Run, open_run
from backbench.common.run.transfer import data_or_world, reading, reading_arguments
from backbench.pretrain import stress, stress_pictures
from backbench.pretrain.class_order import ClassOrder, check_order, class_order_argument, match_classes
from backbench.pretrain.evaluate import as_backbone, load
from backbench.pretrain.outliers import NOISE, PAPER, Outliers, open_outliers
from backbench.pretrain.recipes import ROBUSTNESS, TESTS, RobustnessRecipe
from backbench.pretrain.robustness_report import PRIMARY, finish

# the first stage of a test that uses the labels
LABELLED = {"fgsm": "predict", "occlusion": "score", "between": "score"}
ORDER_IMAGES = 2048  # on which the order of classes is tested
BY_FILE = ("size", "resize", "resize_backend")  # how a file's own test images were made


def main(argv: list[str] | None = None) -> int:
    """Arguments → classifiers, data → a cell for each classifier and test."""
    args = arguments().parse_args(argv)
    if any(setting.startswith("test=") for setting in args.set):
        raise UserError(f"--set test=…: --tests says which, of {', '.join(TESTS)}")
    recipe = override(ROBUSTNESS[args.recipe], args.set)
    tests = list(dict.fromkeys(TESTS if "all" in args.tests else args.tests))
    device = pick_device(args.device)
    if args.name and len(args.name) != len(args.backbone):
        raise UserError(
            f"--name: {len(args.name)} names for {len(args.backbone)} backbones; give one for each"
        )
    test_set = open_classification(data_or_world(args), args.limit or None, args.skip_bad)[1]
    most = min(recipe.ood_images, args.limit or recipe.ood_images)
    outliers = open_outliers(args.ood, most, args.skip_bad) if "ood" in tests else []
    names = args.name or [None] * len(args.backbone)
    subjects = [open_subject(s, n, recipe, args, test_set) for s, n in zip(args.backbone, names)]
    known: dict[str, str] = {}
    for spec, subject in zip(args.backbone, subjects):
        twice = subject.backbone.name
        if twice in known:
            raise UserError(f"{known[twice]} and {spec} are both named {twice}; name each: --name A B …")
        known[twice] = spec
    if is_main():
        for subject in subjects:
            notes = functools.cache(functools.partial(order_notes, subject, test_set, device))
            for test in tests:
                evaluate(subject, test, test_set, outliers, device, args, notes)
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(
        description=__doc__,
        epilog=describe(ROBUSTNESS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--backbone",
        required=True,
        nargs="+",
        help="checkpoints with their classifiers (files of pretrain/run.py, of the official CutMix code, torchvision, "
        "timm …), torchvision:NAME or timm:NAME",
    )
    made.add_argument(
        "--data", metavar="KIND:PATH", help="folder:DIR, cifar10:DIR, cifar100:DIR … (default: scenes)"
    )
    made.add_argument(
        "--tests",
        nargs="+",
        default=["all"],
        choices=["all", *TESTS],
        metavar="TEST",
        help=f"all, or some of {', '.join(TESTS)} (default: all)",
    )
    made.add_argument(
        "--ood",
        nargs="+",
        default=list(NOISE),
        metavar="SET",
        help="out-of-distribution images: uniform, gaussian, NAME=folder:DIR (every image below DIR) or NAME=KIND:PATH "
        "(the test images of another --data), with ,crop (the central pixels as they are) or ,resize (squeezed) at the "
        "end where they are not to be treated as the test images are (default: uniform gaussian); the paper's seven, "
        f"beside whose values they are shown: {' '.join(PAPER)}",
    )
    made.add_argument(
        "--recipe", default="mini", choices=list(ROBUSTNESS), help="named recipe (default: mini)"
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one recipe field; repeatable",
    )
    made.add_argument("--seed", type=whole(), default=0, help="seed of pairs and noise (default: 0)")
    made.add_argument(
        "--name",
        nargs="+",
        help="a name in results for each backbone (default: the file's method, or its name)",
    )
    made.add_argument("--out", type=Path, default=Path("results"), help="results folder (default: results)")
    made.add_argument("--limit", type=whole(), default=0, metavar="N", help="use only N images of each set")
    made.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU when there is one)")
    made.add_argument(
        "--skip-bad", action="store_true", help="leave unreadable images out, counted in the cell"
    )
    made.add_argument("--restart", action="store_true", help="throw away what the cells' folders hold")
    class_order_argument(made)
    reading_arguments(made)
    return made


@dataclass(frozen=True)
class Subject:
    """A classifier to test. `order`: the network's output of each class of the data."""

    model: nn.Module
    backbone: Backbone
    recipe: RobustnessRecipe
    order: ClassOrder


def open_subject(
    spec: str, name: str | None, recipe: RobustnessRecipe, args: argparse.Namespace, test_set: ImageSet
) -> Subject:
    """Load a classifier, with the recipe that sizes the test images as its file says.

    Raises UserError where it has no classifier, or knows other classes than the data's.
    """
    model, facts = load(spec, **reading(args))
    order = match_classes(facts, test_set.classes, spec, args.class_order)
    backbone = as_backbone(spec, model, facts, name)
    return Subject(model, backbone, sized(recipe, facts, args.set), order)


def order_notes(subject: Subject, test_set: ImageSet, device: torch.device) -> tuple[str, ...]:
    """What to note of the order of classes, by what the classifier answers to some of the images as they are.

    Raises UserError where another order fits far better; see `check_order`.
    """
    count = max(ORDER_IMAGES, 4 * len(test_set.classes))
    some = np.unique(np.linspace(0, len(test_set) - 1, min(count, len(test_set))).astype(int))
    recipe = replace(subject.recipe, precision="fp32")
    classify = stress.classifier(subject.model, subject.backbone.mean, subject.backbone.std, recipe, device)
    predicted = stress.run_clean(classify, test_images(test_set, recipe)[some], recipe, device, "class order")
    return check_order(subject.order, predicted, test_set.labels[some], subject.backbone.source)


def sized(recipe: RobustnessRecipe, facts: dict[str, Any], settings: Sequence[str]) -> RobustnessRecipe:
    """The recipe with the test images of a file's own recipe, else of its input size; what --set gives stays."""
    size = facts.get("size", recipe.size)
    own = facts.get("recipe") or {"size": size, "resize": round(size * recipe.resize / recipe.size)}
    given = {setting.partition("=")[0] for setting in settings}
    changed = replace(recipe, **{k: own[k] for k in BY_FILE if k in own and k not in given})
    changed.check()
    return changed


def evaluate(
    subject: Subject,
    test: str,
    test_set: ImageSet,
    outliers: Sequence[Outliers],
    device: torch.device,
    args: argparse.Namespace,
    notes: Callable[[], Sequence[str]],
) -> None:
    """One cell: predict, score, report; nothing where it is finished. `notes`: what to say of the order of classes."""
    backbone = subject.backbone
    recipe = replace(subject.recipe, test=test)
    name, data = label(args.recipe, args.set, recipe), test_set.fingerprint
    others = outliers if test == "ood" else ()
    if test == "ood":
        sets = sorted(one.name for one in others)
        name += "" if sets == sorted(PAPER) else f"+ood={'_'.join(sets)}"
        data = digest(data, [(one.name, one.fingerprint) for one in others])
    run = open_run(
        args.out,
        task="robustness",
        data=test_set.name,
        model=test,
        recipe=recipe,
        recipe_label=name,
        backbone=backbone,
        seed=args.seed,
        train_fingerprint=data,  # a cell of other images is another cell, though nothing is trained
        test_fingerprint=data,
        limit=args.limit,
        restart=args.restart,
        skip_bad=len(test_set.skipped) + sum(len(one.images.skipped) for one in others if one.images),
        more={LABELLED[test]: subject.order.key} if test in LABELLED else None,
    )
    if run.finished:
        print(f"finished already: {run.folder}")
        return
    own_command(run, backbone, test)
    run.note_data([], test_set.report)
    for line in notes() if test in LABELLED else ():
        run.note(line)
    for one in others:
        for line in one.images.report if one.images else ():
            run.note(f"{one.name}: {line}")
    truth = {"labels": subject.order.index[test_set.labels]}
    ids = list(test_set.ids)
    if test == "between":
        if len(ids) < 2:
            raise UserError(f"{test_set.name}: {len(ids)} test image; pairs need two")
        truth["pairs"] = stress.draw_pairs(len(ids), recipe.pairs, args.seed)
    if test == "ood":
        counts = [len(ids), *(one.count for one in others)]
        truth["set"] = np.repeat(np.arange(len(counts)), counts)
        truth["sets"] = np.array([one.name for one in others])
        ids += [one_id for one in others for one_id in one.ids]
    if not run.done("predict"):
        with run.stage("predict", files=["predictions.npz", "examples.jpg"]):
            predict(run, subject, truth, test_set, outliers, device)
    with np.load(run.folder / "predictions.npz") as file:
        answers = dict(file)
    if "blind" in answers:
        blind = int(answers.pop("blind").sum())
        if blind:
            run.note(
                f"{blind} of {len(ids)} images have a gradient of exactly 0: the attack leaves them as they are"
            )
    found = finish(run, test, answers, truth, ids, described(subject, run, truth, outliers), device)
    primary = PRIMARY[test]
    print(
        f"{backbone.name} {test}: {primary} {100 * found['metrics'][primary]:.1f} % (chance "
        f"{100 * found['chance'][primary]:.1f}) → {run.folder}"
    )


def own_command(run: Run, backbone: Backbone, test: str) -> None:
    """Let the cell's provenance name the command of this cell alone, which `backbench rerun` repeats."""
    made = read_json(run.folder / "provenance.json")
    kept, several = [], False
    for part in made.get("command", ()):
        if part.startswith("--"):
            several = part.partition("=")[0] in ("--backbone", "--name", "--tests")
        if not several:
            kept.append(part)
    if kept:
        made["command"] = [*kept, "--backbone", backbone.source, "--name", backbone.name, "--tests", test]
        write_json(run.folder / "provenance.json", made)


def predict(
    run: Run,
    subject: Subject,
    truth: dict[str, np.ndarray],
    test_set: ImageSet,
    outliers: Sequence[Outliers],
    device: torch.device,
) -> None:
    """Write predictions.npz, what the classifier answers, and examples.jpg, what it was shown."""
    recipe, mean, test = run.recipe, subject.backbone.mean, run.recipe.test
    images = test_images(test_set, recipe)
    classify = stress.classifier(subject.model, mean, subject.backbone.std, recipe, device)
    desc = f"{subject.backbone.name} {test}"
    if test == "fgsm":
        answers = stress.run_fgsm(classify, images, truth["labels"], recipe, device, desc)
        picture = stress_pictures.fgsm_examples(classify, images, truth["labels"], recipe.epsilon, device)
    elif test == "occlusion":
        answers = stress.run_occlusion(classify, images, mean, recipe, device, desc)
        picture = stress_pictures.occlusion_examples(images, mean, recipe, device)
    elif test == "between":
        answers = stress.run_between(classify, images, truth["pairs"], recipe, device, desc)
        picture = stress_pictures.between_examples(images, truth["pairs"], recipe, device)
    else:
        readers = [one.reader(recipe, run.identity.seed) for one in outliers]
        sets = [(test_set.name, len(images), images.__getitem__)]
        sets += [(one.name, one.count, read) for one, read in zip(outliers, readers)]
        found = [
            stress.run_confidence(classify, count, read, recipe, device, f"{desc} {name}")
            for name, count, read in sets
        ]
        answers = {"confidence": np.concatenate(found)}
        picture = stress_pictures.ood_examples(images, outliers, readers, device)
    write_jpeg(run.folder / "examples.jpg", picture)
    write_npz(run.folder / "predictions.npz", **answers)


def described(
    subject: Subject, run: Run, truth: dict[str, np.ndarray], outliers: Sequence[Outliers]
) -> list[str]:
    """The report's lines on what was tested, and how."""
    recipe, backbone, test = run.recipe, subject.backbone, run.recipe.test
    how = {
        "fgsm": f"Attack: one step of ±{recipe.epsilon:g}/255 a pixel along the sign of the gradient of the cross "
        "entropy to the true class, cut to the pixels' range.",
        "occlusion": f"Hidden pixels are {'the mean, zero after normalisation' if recipe.fill == 'mean' else 'black'}; "
        f"the hole grows in {recipe.holes} steps from 0 to the whole image; scores are means over the steps.",
        "between": f"{len(truth.get('pairs', ()))} pairs; scores are means over {recipe.lambdas + 1} values of λ and "
        f"{recipe.holes + 1} sizes of the central hole, the ends included. The interval resamples images, not pairs.",
        "ood": "Confidence: the largest softmax probability, temperature 1. Other images: "
        + ", ".join(f"{one.name} ({one.count}{', ' + one.fit if one.fit else ''})" for one in outliers)
        + ". AUROC, TNR@95 and detection accuracy without a name are the unweighted mean over these sets.",
    }
    source = Path(backbone.source).name if Path(backbone.source).exists() else backbone.source
    size = f"short side {recipe.resize}, central {recipe.size}² ({recipe.resize_backend})"
    return [
        how[test],
        "",
        f"Weights: {source}. {len(truth['labels'])} test images: {size}. ![](examples.jpg)",
    ]


if __name__ == "__main__":
    run_main(main)
