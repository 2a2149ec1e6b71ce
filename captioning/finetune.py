"""Train NIC captioning on a backbone's features and score it: BLEU, METEOR, ROUGE-L, CIDEr.

    python captioning/finetune.py --backbone runs/cutmix/cutmix.pt --data captions:images=DIR,train=A.json,val=B.json
    python captioning/finetune.py --backbone resnet50.pth --data captions:COCO --recipe paper

Without --data it uses the embedded world. The same command goes on where an interrupted one stopped.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import time
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from backbench.captioning.captioner import build_nic, decode, save_captioner
from backbench.captioning.data import CaptionItems, centre_crops, pooled_features
from backbench.captioning.nic import NIC
from backbench.captioning.recipes import RECIPES, CaptionRecipe
from backbench.captioning.report import as_markdown, best_and_worst, statistics, write_pictures
from backbench.captioning.scoring import Scorer
from backbench.captioning.vocabulary import Vocabulary, build_vocabulary, words_of_all
from backbench.common.backbones.load import Backbone
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import read_json, write_json
from backbench.common.base.progress import progress
from backbench.common.base.recipe import engine_options, override
from backbench.common.data import open_captions
from backbench.common.data.thumbnails import write_thumbnails
from backbench.common.data.types import CaptionSet
from backbench.common.engine import INIT, is_main, torch_seed, train
from backbench.common.metrics import rescore
from backbench.common.run.cell import Run
from backbench.common.run.transfer import open_transfer, transfer_parser

TASK, MODEL = "captioning", "nic"


def main(argv: list[str] | None = None) -> int:
    """Arguments → recipe → data → backbone → features → training → captions → scores, cell."""
    args = arguments().parse_args(argv)
    recipe = override(RECIPES[args.recipe], args.set)
    opened = open_transfer(
        args, task=TASK, model=MODEL, recipe=recipe, settings=args.set, reader=open_captions
    )
    run, backbone, train_set, test_set = opened.run, opened.backbone, opened.train_set, opened.test_set
    if run.finished:
        return 0
    device = opened.device
    words = words_of_all(train_set.captions, recipe.words, recipe.punctuation)
    vocabulary = build_vocabulary((w for image in words for w in image), recipe.threshold, recipe.punctuation)
    model, cost = train_nic(run, backbone, train_set, words, vocabulary, args, device)
    if is_main():
        vocabulary.save(run.folder / "vocabulary.json")
        second = recipe.encoder_epochs > 0 and not backbone.scratch
        weights = "second/weights.pt" if second else "weights.pt"
        save_captioner(run.folder, model, backbone, recipe, weights)
        write_thumbnails(run.folder.parents[3], test_set.ids, test_set.paths)
        with Scorer(test_set.captions, recipe.tokenizer) as scorer:
            said = Counter(" ".join(w) for image in words for w in image)
            constant = said.most_common(1)[0][0]
            scorer.start([*vocabulary.words, constant])
            predict(run, model, backbone, vocabulary, test_set, device)
            score(run, scorer, test_set, constant, said, len(vocabulary), device, cost)
    return 0


def arguments():
    """The command line of this script."""
    data_help = (
        "captions:images=DIR,train=A.json,val=B.json in COCO's caption format, captions:DIR in COCO's layout"
    )
    made = transfer_parser(__doc__, RECIPES, data_help)
    return made


def train_nic(
    run: Run,
    backbone: Backbone,
    train_set: CaptionSet,
    words: list[list[list[str]]],
    vocabulary: Vocabulary,
    args: Any,
    device: torch.device,
) -> tuple[NIC, dict[str, Any]]:
    """Train NIC: on features of the frozen encoder, and on images where the encoder is trained. → model, cost.

    A scratch encoder is trained from the first step, batch norm included; `encoder_epochs` makes a second phase for
    any other, its batch norm frozen.
    """
    recipe, began = run.recipe, time.monotonic()
    shared = {"folder": run.folder, "key": run.keys["train"], "seed": args.seed, "device": device}
    shared |= {**engine_options(args), "desc": f"NIC {backbone.name}"}
    if backbone.scratch:
        size = recipe.crop(True)[1]
        run.note(f"scratch: the encoder is trained with the captions, on {size} px images, batch norm too")
        model = make_model(recipe, backbone, vocabulary, args.seed, with_trunk=True)
        items = CaptionItems(train_set, words, vocabulary, recipe, crop=recipe.crop(True))
        return model, train(model, step, items, run.training, groups=groups(model, recipe), **shared)
    # no machine decides what the features are: auto is fp32 here
    arithmetic = "fp32" if recipe.precision == "auto" else recipe.precision
    features = pooled_features(backbone, train_set.paths, recipe, device, recipe.views, arithmetic)
    encoding = time.monotonic() - began
    model = make_model(recipe, backbone, vocabulary, args.seed, with_trunk=False)
    items = CaptionItems(train_set, words, vocabulary, recipe, features=features)
    cost = train(model, step, items, run.training, **shared)
    cost = {**cost, "seconds": round(cost["seconds"] + encoding, 2)}
    if recipe.encoder_epochs <= 0:
        return model, cost
    first = model.state_dict()
    model = make_model(recipe, backbone, vocabulary, args.seed, with_trunk=True)
    model.load_state_dict(first, strict=False)
    model.trunk.freeze_bn()
    second = replace(
        run.training, epochs=recipe.encoder_epochs, iterations=0, lr=recipe.lr * recipe.second_lr
    )
    items = CaptionItems(train_set, words, vocabulary, recipe, crop=recipe.crop(False))
    shared |= {"folder": run.folder / "second", "key": f"{run.keys['train']}-second"}
    shared["folder"].mkdir(exist_ok=True)
    more = train(model, step, items, second, groups=groups(model, recipe), **shared)
    for name in ("seconds", "iterations", "images"):
        cost[name] += more[name]
    return model, {**cost, "peak_memory_mb": max(cost["peak_memory_mb"], more["peak_memory_mb"])}


def make_model(
    recipe: CaptionRecipe, backbone: Backbone, vocabulary: Vocabulary, seed: int, *, with_trunk: bool
) -> NIC:
    """NIC with initial weights drawn from `seed`."""
    torch.manual_seed(torch_seed(INIT, seed))
    words = len(vocabulary)
    return build_nic(recipe, backbone.trunk, words, backbone.mean, backbone.std, with_trunk=with_trunk)


def groups(model: NIC, recipe: CaptionRecipe) -> list[dict[str, Any]]:
    """Parameter groups: the rest of NIC, and the encoder at its own rate."""
    encoder = [p for p in model.trunk.parameters() if p.requires_grad]
    inside = {id(p) for p in model.trunk.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [{"params": rest}, {"params": encoder, "lr": recipe.encoder_lr}]


def step(model: torch.nn.Module, batch: dict[str, Any], _: Any) -> dict[str, torch.Tensor]:
    """One training step: the mean loss of a word."""
    return {"loss": model(batch["inputs"], batch["captions"], batch["groups"])}


@torch.inference_mode()
def predict(
    run: Run,
    model: NIC,
    backbone: Backbone,
    vocabulary: Vocabulary,
    test_set: CaptionSet,
    device: torch.device,
) -> None:
    """Write predictions.json, COCO's caption results: a list of {"image_id", "caption"}."""
    if run.done("predict"):
        return
    recipe = run.recipe
    with run.stage("predict", files=["predictions.json", "vocabulary.json"]):
        if model.trunk is None:
            features = pooled_features(backbone, test_set.paths, recipe, device, 1, recipe.eval_precision)[
                :, 0
            ]
            blocks = (features[i : i + recipe.test_batch] for i in range(0, len(features), recipe.test_batch))
        else:
            blocks = centre_crops(test_set.paths, recipe.crop(backbone.scratch), recipe.test_batch)
        model.to(device).eval()
        captions: list[str] = []
        for block in progress(blocks, desc="captioning", unit="batch", delay=2):
            inputs = torch.from_numpy(block.copy()).to(device)
            captions += decode(model, inputs, recipe, vocabulary)[0]
        results = [{"image_id": int(i), "caption": c} for i, c in zip(test_set.ids, captions)]
        write_json(run.folder / "predictions.json", results)


def score(
    run: Run,
    scorer: Scorer,
    test_set: CaptionSet,
    constant: str,
    training: Collection[str],
    vocabulary: int,
    device: torch.device,
    cost: dict[str, Any],
) -> None:
    """Score predictions.json and the constant caption by the same evaluator; write the cell.

    `training` holds all training captions, as words separated by spaces.
    """
    captions = [entry["caption"] for entry in read_json(run.folder / "predictions.json")]
    if len(captions) != len(test_set):
        raise UserError(f"{run.folder / 'predictions.json'}: changed by hand? delete it and run again")
    images = scorer.statistics(captions)
    constant_images = scorer.statistics([constant] * len(test_set))
    for line in scorer.notes:
        run.note(line)
    metrics: dict[str, float | None] = {k: float(v[0]) for k, v in rescore(TASK, images).items()}
    metrics.setdefault("METEOR", None)
    chance = {k: float(v[0]) for k, v in rescore(TASK, constant_images).items()}
    report = {
        "metrics": metrics,
        "chance": chance,
        "chance caption": constant,
        "captions": statistics(captions, scorer.references)
        | {"vocabulary": vocabulary, "captions of training": sum(c in training for c in captions)},
        **best_and_worst(images, captions, test_set.ids, test_set.captions, test_set.paths),
    }
    write_pictures(run.folder, report)
    run.finish(
        metrics=metrics,
        chance=chance,
        primary="CIDEr",
        images={"ids": np.array([str(i) for i in test_set.ids]), **images},
        report=report,
        report_md=as_markdown(run, report, cost),
        device=device,
        cost=cost,
    )
    print(f"CIDEr {100 * metrics['CIDEr']:.1f} (chance {100 * chance['CIDEr']:.1f}) → {run.folder}")


if __name__ == "__main__":
    run_main(main)
