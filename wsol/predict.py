"""Draw what trained networks look at: class activation maps and boxes, several backbones side by side.

    python wsol/predict.py --run DIR [DIR …] IMAGE… [--boxes FILE] [--label CLASS] [--out DIR]
    python wsol/predict.py --run DIR [DIR …] --mix A.jpg B.jpg [--classes A B] [--out DIR]

DIR is a run folder of wsol/finetune.py; another folder after it stands for the pictures directly in it. The first form
draws the paper's figure 4: for each image OUT/NAME.png with heat, the true box in red (of --boxes, rows
`path,x0,y0,x1,y1` in shares; an image is the one whose path ends so) and the found box in green, a column a run; and
OUT/localisation.json. The map is of the class predicted, or of --label; IoU is taken inside the test crop, where the
maps are, as the scores take it.
The second draws the paper's figure 1, OUT/mixed-NAME.png a run: two images, mixed by Mixup, Cutout and CutMix, with the
maps of both their classes (those predicted for the originals, unless --classes names them).
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import backbench.common  # noqa: F401  first, before torch

# isort: split

import argparse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from backbench.common.base.arguments import Parser, whole
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, write_json
from backbench.common.classify.mixing import cutmix, cutmix_box, cutout, mixup
from backbench.common.data.boxes import read_box_csv
from backbench.common.data.decode import read_rgb
from backbench.common.data.layout import Report
from backbench.common.data.pictures import find_pictures
from backbench.common.engine import pick_device
from backbench.common.metrics.localisation import best_iou
from backbench.wsol.boxes import boxes_from_maps, from_crop, to_crop
from backbench.wsol.model import Predictor, load_predictor, shares_of
from backbench.wsol.pictures import GREEN, RED, captioned, draw_boxes, fitted, overlay, save_picture, sheet

WHOLE = np.array([0.0, 0.0, 1.0, 1.0])


def main(argv: list[str] | None = None) -> int:
    """Arguments → networks → pictures."""
    args = arguments().parse_args(argv)
    if not args.run[0].is_dir():
        raise UserError(f"--run {args.run[0]}: no such folder")
    # argparse gives --run all that follows it: past the first, a folder without a recipe holds pictures
    folders = args.run[:1] + [path for path in args.run[1:] if (path / "recipe.json").is_file()]
    given = [path for path in args.run if path not in folders] + args.images
    if bool(given) == bool(args.mix):
        raise UserError("name images to localise in, or two with --mix A B, not both")
    device = pick_device(args.device)
    predictors = [load_predictor(folder, device) for folder in folders]
    images = find_pictures(given)
    if not 0 < args.lam < 1:
        raise UserError(f"--lam {args.lam}: λ is above 0 and below 1")
    make_folder(args.out)
    if args.mix:
        for name, predictor in zip(names(predictors), predictors):
            path = args.out / f"mixed-{name}.png"
            save_picture(path, figure_1(predictor, *args.mix, args.classes, args.lam, args.seed))
            print(path)
        return 0
    truths = read_box_csv(args.boxes, Report()) if args.boxes else {}
    entries = []
    for path, name in zip(images, unique([image.stem for image in images])):
        picture, found = figure_4(predictors, path, truth_of(path, truths), args.label)
        save_picture(args.out / f"{name}.png", picture)
        entries.append({"image": str(path), "runs": found})
        print(args.out / f"{name}.png")
    write_json(args.out / "localisation.json", entries)
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--run", type=Path, nargs="+", required=True, metavar="DIR", help="run folders")
    made.add_argument("images", type=Path, nargs="*", help="images to localise in, and folders of them")
    made.add_argument("--boxes", type=Path, metavar="FILE", help="true boxes, path,x0,y0,x1,y1 in shares")
    made.add_argument("--label", metavar="CLASS", help="class whose map is drawn (default: the predicted)")
    made.add_argument("--mix", type=Path, nargs=2, metavar=("A", "B"), help="two images to mix (figure 1)")
    made.add_argument("--classes", nargs=2, metavar=("A", "B"), help="their classes (default: the predicted)")
    made.add_argument("--lam", type=float, default=0.6, help="share of A that mixing keeps (default: .6)")
    made.add_argument("--seed", type=whole(), default=0, help="of where the patch lies (default: 0)")
    made.add_argument("--out", type=Path, default=Path("pictures"), help="output folder (default: pictures)")
    made.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU when there is one)")
    return made


def unique(texts: Sequence[str]) -> list[str]:
    """Texts made different from one another by numbers."""
    counts: dict[str, int] = {}
    done = []
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
        done.append(text if counts[text] == 1 else f"{text}-{counts[text]}")
    return done


def names(predictors: Sequence[Predictor]) -> list[str]:
    """What each run is called: its backbone, with the seed where backbones are alike."""
    plain = [predictor.facts["backbone"] for predictor in predictors]
    seeded = [f"{name}-seed{p.facts['seed']}" for name, p in zip(plain, predictors)]
    return plain if len(set(plain)) == len(plain) else unique(seeded)


def truth_of(path: Path, truths: dict[str, np.ndarray]) -> np.ndarray:
    """The true boxes of an image: those of the longest listed path that its own ends with; else none."""
    parts = path.absolute().parts
    fits = [name for name in truths if parts[-len(PurePosixPath(name).parts) :] == PurePosixPath(name).parts]
    return truths[max(fits, key=len)] if fits else np.zeros((0, 4))


def class_index(predictor: Predictor, name: str) -> int:
    """The index of a class. Raises UserError with what is known."""
    if name not in predictor.classes:
        known = ", ".join(predictor.classes[:8]) + (", …" if len(predictor.classes) > 8 else "")
        raise UserError(f"{predictor.folder}: class '{name}' is unknown to this run; it knows {known}")
    return predictor.classes.index(name)


def figure_4(
    predictors: Sequence[Predictor], path: Path, truth: np.ndarray, label: str | None
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image's row: itself, then a picture a run; and what was found, as plain values."""
    image = read_rgb(path)
    shown = fitted(image)
    said = "true box red, found box green" if len(truth) else "found box green"
    row, entries = [captioned(draw_boxes(shown, truth, RED), [path.name, said])], []
    for name, predictor in zip(names(predictors), predictors):
        facts = predictor.facts
        chances, maps = predictor.maps(predictor.normalised(predictor.read(image)[None]))
        predicted = int(chances[0].argmax())
        drawn = predicted if label is None else class_index(predictor, label)
        found = boxes_from_maps(maps[:, drawn], facts["size"], facts["threshold"])
        box = from_crop(found, facts["resize"], facts["size"])[0] if found.any() else np.zeros(4)
        inside = to_crop(truth, facts["resize"], facts["size"])  # as the score counts it
        overlap = float(best_iou(found, [inside])[0]) if len(truth) else None
        picture = overlay(shown, shares_of(maps[0, drawn]), predictor.window)
        picture = draw_boxes(draw_boxes(picture, truth, RED), box, GREEN)
        class_name = predictor.classes[drawn]
        text = f"{class_name}: {100 * chances[0, drawn]:.0f} %" + (
            "" if overlap is None else f", IoU {overlap:.2f}"
        )
        row.append(captioned(picture, [name, text]))
        entries.append(
            {
                "run": str(predictor.folder),
                "backbone": name,
                "predicted": predictor.classes[predicted],
                "drawn": class_name,
                "probability": float(chances[0, drawn]),
                "box": box.tolist(),
                "IoU": overlap,
            }
        )
    return sheet([row]), entries


def figure_1(
    predictor: Predictor, first: Path, second: Path, classes: Sequence[str] | None, lam: float, seed: int
) -> np.ndarray:
    """Rows: the two originals; A mixed with B by Mixup, Cutout, CutMix; maps of A's class; maps of B's class.

    CutMix's box and Cutout's square have one centre; every picture is what the network sees.
    """
    crops = np.stack([predictor.read(read_rgb(path)) for path in (first, second)])
    originals = predictor.normalised(crops)
    size, other = originals.shape[2], torch.tensor([1, 0], device=originals.device)
    centre = np.random.default_rng(seed).integers(size // 4, size - size // 4, 2)
    box = cutmix_box(size, size, lam, (int(centre[0]), int(centre[1])))
    centres = torch.from_numpy(np.tile(centre, (2, 1))).to(originals.device)
    inputs = torch.stack(
        [
            mixup(originals, other, lam)[0],
            cutout(originals, centres, size // 2)[0],
            cutmix(originals, other, box)[0],
        ]
    )
    chances, maps = predictor.maps(torch.cat([originals, inputs]))
    pair = [class_index(predictor, name) for name in classes or []] or chances[:2].argmax(1).tolist()
    texts = [predictor.classes[index] for index in pair]
    columns = ("Mixup", "Cutout", "CutMix")
    top = [
        captioned(fitted(crop), [f"{which}: {path.name}", f"{text}: {100 * chances[number, index]:.0f} %"])
        for number, (which, crop, path, text, index) in enumerate(
            zip("AB", crops, (first, second), texts, pair)
        )
    ]
    shown = [fitted(crop) for crop in predictor.pixels(inputs)]
    middle = [captioned(picture, [name]) for picture, name in zip(shown, columns)]
    heat = [
        [
            captioned(
                overlay(picture, shares_of(maps[2 + k, index]), WHOLE),
                [f"map of {text}: {100 * chances[2 + k, index]:.0f} %"],
            )
            for k, picture in enumerate(shown)
        ]
        for text, index in zip(texts, pair)
    ]
    return sheet([top, middle, *heat])


if __name__ == "__main__":
    run_main(main)
