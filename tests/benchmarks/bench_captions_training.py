"""An epoch of NIC with a frozen encoder: features computed once, against the base code's encoder pass a caption.

    python tests/benchmarks/bench_captions_training.py --full --json training.json
    python tests/benchmarks/bench_captions_training.py --full --device cuda --images 2000

Both train the same decoder, --recipe's, for an epoch of n images × 5 captions, their lengths spread as COCO's (mean
10.5 words). The base code's loop runs the encoder on every caption's image (decoded and cropped here beforehand, which
favours it), 20 captions a step. Ours runs it `views` times an image before the first epoch, which is told apart, and
never again; in `modern` an item is an image with its five captions, in `paper`, the base code's decoder, it has one.
Encoder forwards are counted in images. The sides take turns, the fastest epoch counts; on a CPU in seconds of processor
time, which other load disturbs less.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import backbench.common  # noqa: F401  first, before torch

# isort: split

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from backbench.captioning.data import CaptionItems
from backbench.captioning.finetune import step
from backbench.captioning.nic import NIC
from backbench.captioning.recipes import PAPER, RECIPES, CaptionRecipe
from backbench.captioning.vocabulary import PAD, Vocabulary
from backbench.common.backbones.resnet import Trunk, normalise
from backbench.common.base.recipe import override
from backbench.common.data.types import CaptionSet
from backbench.common.engine import train

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Make images and captions, train an epoch on each side in turn, print the ratios."""
    args = arguments().parse_args()
    device = torch.device(args.device)
    arch, side, images, words = (
        ("resnet50", 224, 200, 9000) if args.full else ("resnet18_half", 64, 100, 1000)
    )
    images = args.images or images
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    vocabulary = Vocabulary([f"w{i}" for i in range(words)], punctuation=False)
    lengths = np.maximum(6, rng.normal(10.5, 2.4, (images, 5)).round().astype(int))
    spoken = [[rng.choice(vocabulary.words[4:], k).tolist() for k in image] for image in lengths]
    trunk = Trunk(arch).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    counted = [0]
    trunk.register_forward_hook(lambda _, inputs, __: counted.__setitem__(0, counted[0] + len(inputs[0])))
    times: dict[str, list[float]] = {"base": [], "ours": [], "encoding": []}
    forwards = {}
    for _ in range(args.runs):
        began, counted[0] = clock(device), 0
        features = encode(trunk, pictures, device)
        times["encoding"].append(clock(device) - began)
        forwards["encoding, one view"] = counted[0]
        for name, epoch in (("ours", ours), ("base", base)):
            began, counted[0] = clock(device), 0
            epoch(trunk, pictures, features, spoken, vocabulary, device, RECIPES[args.recipe])
            times[name].append(clock(device) - began)
            forwards[name] = counted[0]
    fastest = {name: min(values) for name, values in times.items()}
    epochs, views = PAPER.epochs, PAPER.views
    whole = views * fastest["encoding"] + epochs * fastest["ours"]
    result = {
        "arch": arch,
        "recipe": args.recipe,
        "images": images,
        "device": device.type,
        **{f"{name}, s": value for name, value in fastest.items()},
        **{f"{name}, encoder forwards": value for name, value in forwards.items()},
        "ours, images a second": images / fastest["ours"],
        "× an epoch": fastest["base"] / fastest["ours"],
        f"× {epochs:g} epochs with {views} views": epochs * fastest["base"] / whole,
        f"× encoder forwards, {epochs:g} epochs with {views} views": epochs
        * forwards["base"]
        / (views * images),
    }
    for name, value in result.items():
        print(f"{name:48} {value if isinstance(value, str | int) else f'{value:.4g}'}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--full", action="store_true", help="ResNet-50 at 224 px instead of a small one at 64")
    made.add_argument("--images", type=int, default=0)
    made.add_argument("--recipe", choices=("modern", "paper"), default="modern", help="whose decoder")
    made.add_argument("--runs", type=int, default=2)
    made.add_argument("--device", default="cpu")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def clock(device: torch.device) -> float:
    """Seconds: of the wall once a GPU is idle, of the processor on a CPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def encode(trunk: Trunk, pictures: np.ndarray, device: torch.device, block: int = 20) -> np.ndarray:
    """Pooled features (n, 1, D)."""
    parts = [
        trunk(normalise(torch.from_numpy(pictures[i : i + block]).to(device), MEAN, STD)).mean((2, 3)).cpu()
        for i in range(0, len(pictures), block)
    ]
    return torch.cat(parts).numpy()[:, None]


def make_nic(trunk: Trunk, vocabulary: Vocabulary, recipe: CaptionRecipe) -> NIC:
    """The recipe's decoder."""
    torch.manual_seed(0)
    options = {"embed": recipe.embed, "hidden": recipe.hidden, "dropout": recipe.dropout, "feature_bn": True}
    return NIC(trunk.channels["layer4"], len(vocabulary), **options)


def ours(trunk, pictures, features, spoken, vocabulary, device, recipe) -> None:
    """An epoch as captioning/finetune.py trains it."""
    recipe = override(recipe, ["epochs=1", "batch=20", "save_every=1e9"])
    images = CaptionSet("bench", list(range(len(spoken))), [Path()] * len(spoken), [[]] * len(spoken))
    items = CaptionItems(images, spoken, vocabulary, recipe, features=features)
    model = make_nic(trunk, vocabulary, recipe)
    with tempfile.TemporaryDirectory() as folder:
        train(model, step, items, recipe, folder=Path(folder), key="bench", seed=0, device=device)


def base(trunk, pictures, features, spoken, vocabulary, device, recipe) -> None:
    """An epoch as the base code trains: every caption's image through the encoder."""
    model = make_nic(trunk, vocabulary, recipe).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    items = [(i, words) for i, captions in enumerate(spoken) for words in captions]
    order = np.random.default_rng(0).permutation(len(items))
    for start in range(0, len(items), 20):
        chosen = [items[k] for k in order[start : start + 20]]
        batch = torch.from_numpy(pictures[[i for i, _ in chosen]]).to(device)
        with torch.no_grad():
            inputs = trunk(normalise(batch, MEAN, STD)).mean((2, 3))
        encoded = [torch.tensor(vocabulary.encode(words, 50)) for _, words in chosen]
        captions = pad_sequence(encoded, batch_first=True, padding_value=PAD)[:, None].to(device)
        optimizer.zero_grad()
        model(inputs, captions).backward()
        optimizer.step()


if __name__ == "__main__":
    main()
