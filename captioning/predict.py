"""Say what a trained captioner sees in pictures.

    python captioning/predict.py --run results/COCO/captioning/nic/modern/cutmix/seed0 photo.jpg holiday/ \\
        --pictures captioned --json captions.json

RUN is the folder of a finished captioning/finetune.py: weights.pt, encoder.pt, model.json and vocabulary.json are read,
nothing else. A folder stands for the pictures directly in it. Each picture gets a line: its name, its caption and the
caption's score, a summed log-probability over what the recipe's length penalty divides by.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from backbench.captioning.captioner import Captioner, decode, load_captioner
from backbench.captioning.data import centre_crops
from backbench.common.base.arguments import Parser
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, write_json
from backbench.common.base.recipe import override
from backbench.common.data.decode import read_rgb
from backbench.common.data.pictures import find_pictures, picture_names, write_jpeg
from backbench.common.engine import pick_device


def main(argv: list[str] | None = None) -> int:
    """Arguments → captioner → captions, printed, and written where asked."""
    args = arguments().parse_args(argv)
    device = pick_device(args.device)
    captioner = with_settings(load_captioner(args.run.expanduser()), args.set)
    paths = find_pictures(args.images)
    if args.json:
        make_folder(args.json.parent)  # now, not after minutes of work
    captions, scores = describe(captioner, paths, device)
    for path, caption, score in zip(paths, captions, scores):
        print(f"{path}: {caption or '(empty)'} ({score:.3f})")
    names = picture_names(paths)
    if args.pictures:
        folder = make_folder(args.pictures.expanduser())
        for path, name, caption in zip(paths, names, captions):
            write_jpeg(folder / name, with_caption(read_rgb(path), caption))
        print(f"{len(paths)} pictures → {folder}")
    if args.json:
        rows = zip(paths, captions, scores)
        write_json(args.json, [{"image": str(p), "caption": c, "score": round(s, 6)} for p, c, s in rows])
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("images", nargs="+", type=Path, help="picture files and folders of them")
    made.add_argument("--run", required=True, type=Path, help="folder of a finished captioning/finetune.py")
    made.add_argument("--pictures", type=Path, metavar="DIR", help="save the pictures with their captions")
    made.add_argument("--json", type=Path, metavar="FILE", help="write images, captions and scores")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change how captions are searched for: beam, penalty, alpha, shortest, longest, end, emit_unk",
    )
    made.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: a GPU when there is one)")
    return made


def with_settings(captioner: Captioner, settings: Sequence[str]) -> Captioner:
    """The captioner with recipe fields of prediction changed. Raises UserError for any other field."""
    recipe = override(captioner.recipe, list(settings)) if settings else captioner.recipe
    for field in dataclasses.fields(recipe):
        if field.metadata["stage"] != "predict" and any(s.partition("=")[0] == field.name for s in settings):
            raise UserError(f"--set {field.name}: the captioner is trained; only its search can be changed")
    return dataclasses.replace(captioner, recipe=recipe)


def describe(
    captioner: Captioner, paths: Sequence[Path], device: torch.device
) -> tuple[list[str], list[float]]:
    """A caption and its score for each picture."""
    captions: list[str] = []
    scores: list[float] = []
    model = captioner.model.to(device)
    for block in centre_crops(paths, captioner.crop, captioner.recipe.test_batch):
        inputs = torch.from_numpy(block).to(device)
        said, values = decode(model, inputs, captioner.recipe, captioner.vocabulary)
        captions, scores = captions + said, scores + values
    return captions, scores


def with_caption(image: np.ndarray, caption: str) -> Image.Image:
    """The uint8 picture (H, W, 3), at least 320 pixels wide, above its caption."""
    picture = Image.fromarray(image)
    if picture.width < 320:
        picture = picture.resize((320, round(picture.height * 320 / picture.width)))
    font = ImageFont.load_default(size=max(14, picture.width // 32))
    letters = max(8, int(picture.width * 0.95 / font.getlength("n")))
    text = "\n".join(textwrap.wrap(caption or "(empty)", letters))
    left, top, right, bottom = ImageDraw.Draw(picture).multiline_textbbox((0, 0), text, font=font)
    margin = picture.width // 40
    page = Image.new("RGB", (picture.width, picture.height + round(bottom - top) + 2 * margin), "white")
    page.paste(picture)
    place = (max(0, (picture.width - (right - left)) / 2) - left, picture.height + margin - top)
    ImageDraw.Draw(page).multiline_text(place, text, fill="black", font=font, align="center")
    return page


if __name__ == "__main__":
    run_main(main)
