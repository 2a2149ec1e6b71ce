"""A trained captioner: what it says of inputs; kept in its run folder and read back from there."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbench.captioning.beam import beam_search
from backbench.captioning.nic import NIC
from backbench.captioning.recipes import CaptionRecipe
from backbench.captioning.vocabulary import END, PAD, START, UNK, Vocabulary, load_vocabulary
from backbench.common.backbones.load import Backbone
from backbench.common.backbones.resnet import Trunk
from backbench.common.base.errors import UserError
from backbench.common.base.files import read_json, write_atomic, write_json
from backbench.common.base.recipe import to_json
from backbench.common.engine import autocast


@dataclass(frozen=True)
class Captioner:
    """NIC with its encoder, and what it needs around it."""

    model: NIC
    recipe: CaptionRecipe
    vocabulary: Vocabulary
    crop: tuple[int, int]  # (resize, size) of test images


@torch.inference_mode()
def decode(
    model: NIC, inputs: Tensor, recipe: CaptionRecipe, vocabulary: Vocabulary
) -> tuple[list[str], list[float]]:
    """Captions and scores of images uint8 (n, H, W, 3), or of features (n, D) where the model has no trunk.

    A score is the caption's summed log-probability over what the recipe's length penalty divides it by. Raises
    UserError where the network's outputs are not finite.
    """
    banned = [PAD, START] if recipe.emit_unk else [PAD, START, UNK]
    with autocast(recipe.eval_precision, inputs.device):
        state = model.start(inputs)
    search = recipe.search
    numbers, scores = beam_search(
        model.advance, state, len(inputs), search, start=START, end=END, banned=banned
    )
    values = scores.tolist()
    if not all(map(math.isfinite, values)):
        raise UserError(
            "the captions' scores are not finite: the captioner's weights are broken; train again with a lower --set lr"
        )
    return [vocabulary.decode(row) for row in numbers.tolist()], values


def save_captioner(folder: Path, model: NIC, backbone: Backbone, recipe: CaptionRecipe, weights: str) -> None:
    """Write model.json and, where the encoder was not trained, encoder.pt beside a run's `weights`."""
    frozen = model.trunk is None
    if frozen and not (folder / "encoder.pt").exists():
        state = {name: value.detach().cpu() for name, value in backbone.trunk.state_dict().items()}
        write_atomic(folder / "encoder.pt", lambda file: torch.save(state, file))
    facts: dict[str, Any] = {
        "format": "captioner-1",
        "arch": backbone.arch,
        "stride_in_1x1": backbone.stride_in_1x1,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "crop": list(recipe.crop(backbone.scratch)),
        "weights": weights,
        "encoder": "encoder.pt" if frozen else None,
        "recipe": to_json(recipe),
    }
    write_json(folder / "model.json", facts)


def load_captioner(folder: Path) -> Captioner:
    """Read a finished run of captioning/finetune.py. Raises UserError for any other folder."""
    if not (folder / "model.json").exists():
        raise UserError(f"{folder}: has no model.json; give the folder of a finished captioning/finetune.py")
    facts = read_json(folder / "model.json")
    if facts.get("format") != "captioner-1":
        raise UserError(f"{folder / 'model.json'}: not of captioning/finetune.py; what run is this?")
    recipe = _recipe(facts["recipe"], folder / "model.json")
    vocabulary = load_vocabulary(folder / "vocabulary.json")
    trunk = Trunk(facts["arch"], facts["stride_in_1x1"])
    state = _read_weights(folder / facts["weights"])["model"]
    if facts["encoder"]:
        encoder = _read_weights(folder / facts["encoder"])
        state |= {f"trunk.{name}": value for name, value in encoder.items()}
    model = build_nic(recipe, trunk, len(vocabulary), facts["mean"], facts["std"], with_trunk=True)
    model.load_state_dict(state)
    return Captioner(model.eval(), recipe, vocabulary, tuple(facts["crop"]))


def _recipe(values: dict[str, Any], path: Path) -> CaptionRecipe:
    unknown = sorted(values.keys() - {field.name for field in fields(CaptionRecipe)})
    if unknown:
        raise UserError(f"{path}: recipe fields {', '.join(unknown)} are unknown here: update backbench")
    return CaptionRecipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _read_weights(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the run is not finished, or was copied without it") from None
    except Exception as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0][:100]})") from None


def build_nic(
    recipe: CaptionRecipe, trunk: Trunk, words: int, mean: Any, std: Any, *, with_trunk: bool
) -> NIC:
    """NIC as the recipe says, for the features of `trunk`; `with_trunk` makes it a part of the model."""
    return NIC(
        trunk.channels["layer4"],
        words,
        embed=recipe.embed,
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        feature_bn=recipe.feature_bn,
        trunk=trunk if with_trunk else None,
        mean=mean,
        std=std,
    )
