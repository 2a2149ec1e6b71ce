"""Score anyone's localisation maps: one .npy of 2-D scores an image, named as in the box list.

    python wsol/evaluate.py --scoremaps DIR --boxes FILE [--labels FILE] [--protocol paper|choe2020] [--json FILE]

FILE of boxes: rows `path,x0,y0,x1,y1` in shares of the image, several an image. The map of `val/dog/1.jpg` is
DIR/val/dog/1.jpg.npy or DIR/val/dog/1.npy and shows the true class. FILE of labels: rows `path,label,predicted`,
wanted for Top-1 Loc; with up to five predicted classes, best first, `;` between them, Top-5 Loc is given too.
A map covers its whole image, unless --resize and --crop say of which centre crop it is.

Without --protocol both are scored. choe2020: MaxBoxAcc, MaxBoxAccV2 and the threshold curves by the conventions of
wsolevaluation (see wsol/choe2020.py); with --masks DIR, PxAP too, with or without --boxes: the mask of
`val/dog/1.jpg` is DIR/val/dog/1.png (or 1.jpg.png), 0 background, 255 object, any other value ignored.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from backbench.common.base.arguments import Parser, whole
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, write_json
from backbench.common.data.boxes import read_box_csv
from backbench.common.data.decode import threaded
from backbench.common.data.layout import Report, files_below, need_folder
from backbench.common.metrics import rescore
from backbench.common.metrics.localisation import IOU_RIGHT, best_centred_box, best_iou
from backbench.wsol.boxes import boxes_from_maps, to_crop
from backbench.wsol.choe2020 import (
    SIDE,
    Sweep,
    box_statistics,
    centred_box_accuracies,
    curves,
    pixel_average_precision,
    pixel_counts,
    pixel_truths,
    scaled_map,
    sweep,
)

LABELS_HEADER = ["path", "label", "predicted"]
PROTOCOLS = ("paper", "choe2020")


def main(argv: list[str] | None = None) -> int:
    """Arguments → maps and true boxes → boxes → scores, printed and, with --json, written."""
    args = arguments().parse_args(argv)
    protocols = (args.protocol,) if args.protocol else PROTOCOLS
    resize, crop = frame(args, protocols)
    if args.json:
        make_folder(args.json.parent)  # now, not after the work
    report = Report()
    shares = read_box_csv(args.boxes, report) if args.boxes else {}
    need_folder(args.scoremaps, "one .npy of 2-D scores an image, named as in the box list")
    masks = mask_files(args.masks, list(shares)) if args.masks else {}
    ids = list(shares) or list(masks)
    files = files_of(args.scoremaps, ids, ".npy", "maps")
    truths = [to_crop(part, resize, crop) for part in shares.values()]
    metrics, baseline, more = {}, {}, {}
    if "paper" in protocols and truths:
        ranks = read_ranks(args.labels, ids, report) if args.labels else None
        metrics, baseline = paper_scores(files, truths, ranks, args.threshold, crop)
    if "choe2020" in protocols:
        found = choe_scores(files, truths, list(masks.values()), crop)
        metrics, baseline, more = metrics | found[0], baseline | found[1], found[2]
    scores = {
        "metrics": metrics,
        "centred box": baseline,
        "images": len(files),
        "protocols": list(protocols),
        "threshold": args.threshold,
        "frame": {"resize": resize, "crop": crop},
        **more,
        "data": report.lines(),
    }
    show(scores)
    if args.json:
        write_json(args.json, scores)
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scoremaps", type=Path, required=True, metavar="DIR", help="folder of .npy maps")
    made.add_argument("--boxes", type=Path, metavar="FILE", help="true boxes, path,x0,y0,x1,y1")
    made.add_argument("--labels", type=Path, metavar="FILE", help="path,label,predicted: for Top-1 Loc")
    made.add_argument("--masks", type=Path, metavar="DIR", help="folder of .png masks: for PxAP")
    made.add_argument("--protocol", choices=PROTOCOLS, help="one of the two (default: both)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the scores there")
    made.add_argument(
        "--threshold",
        type=float,
        default=0.15,
        help="share of a map's maximum, protocol paper (default: .15)",
    )
    made.add_argument(
        "--size",
        type=whole(1),
        default=SIDE,
        help="side to which protocol paper enlarges maps (default: 224)",
    )
    made.add_argument(
        "--resize", type=whole(1), help="maps are of a centre crop of the image squeezed to this side …"
    )
    made.add_argument("--crop", type=whole(1), help="… and this is the crop's side (paper: 256, 224)")
    return made


def frame(args: argparse.Namespace, protocols: Sequence[str]) -> tuple[int, int]:
    """The sides (resize, crop) of what the maps show. Raises UserError for arguments that do not go together."""
    if (args.resize is None) != (args.crop is None):
        raise UserError("--resize and --crop belong together (the paper's are 256 and 224)")
    resize, crop = (args.resize, args.crop) if args.crop else (args.size, args.size)
    if not 0 < crop <= resize or not 0 <= args.threshold < 1:
        raise UserError("needed: 0 < --crop <= --resize, --size above 0 and --threshold from 0 to below 1")
    if not args.boxes and not args.masks:
        raise UserError("nothing to score against: give --boxes FILE, or --masks DIR for PxAP")
    if args.masks and "choe2020" not in protocols:
        raise UserError("--masks is for PxAP, which protocol choe2020 has; leave --protocol out")
    if args.masks and args.crop:
        raise UserError(
            "--masks are of whole images, --crop says that the maps are not; make maps of whole images"
        )
    if args.labels and (not args.boxes or "paper" not in protocols):
        raise UserError("--labels is for Top-1 Loc, which needs --boxes and protocol paper")
    return resize, crop


def files_of(folder: Path, ids: Sequence[str], ending: str, what: str) -> list[Path]:
    """Each image's file: ID + ending, else ID without its own ending + ending. UserError naming the first absent."""
    files, absent = [], []
    for name in ids:
        tried = [folder / f"{name}{ending}", (folder / name).with_suffix(ending)]
        there = [path for path in tried if path.is_file()]
        files += there[:1]
        if not there:
            absent.append(tried[0])
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(ids)} {what} are absent (first: {absent[0]})")
    return files


def mask_files(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    """The mask of each image; without ids, every .png below the folder, by its path less the ending."""
    need_folder(folder, "one .png mask an image, named as in the box list")
    if ids:
        return dict(zip(ids, files_of(folder, ids, ".png", "masks")))
    found = sorted(files_below(folder, folder, Report(), (".png",)))
    if not found:
        raise UserError(f"{folder}: holds no .png mask")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def read_mask(path: Path) -> np.ndarray:
    """A mask as uint8 (224, 224): 1 object, 0 background, 2 ignored. Nearest neighbours, as wsolevaluation."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise UserError(f"{path}: not a readable image")
    mask = cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    return np.select([mask == 0, mask == 255], [0, 1], 2).astype(np.uint8)


def read_map(path: Path) -> np.ndarray:
    """A finite 2-D map as float32. Raises UserError naming the file."""
    try:
        image = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npy file of numbers ({error})") from None
    if (
        not isinstance(image, np.ndarray)
        or image.ndim != 2
        or image.dtype.kind not in "fiub"
        or not image.size
    ):
        raise UserError(
            f"{path}: a 2-D array of numbers was expected, found {getattr(image, 'shape', 'an archive')}"
        )
    if not np.isfinite(image).all():
        raise UserError(f"{path}: holds values that are not finite")
    return image.astype(np.float32)


def read_ranks(path: Path, ids: Sequence[str], report: Report) -> tuple[np.ndarray, int]:
    """The place of each image's class among those predicted, int (n,), and how many are predicted, k at most 5.

    The place is k when the class is not among them. Raises UserError with file and line; notes rows of images that are
    not scored, and that no predicted class is the label of any image.
    """
    rows: dict[str, tuple[str, list[str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            if header != LABELS_HEADER:
                raise UserError(
                    f"{path} line 1: header is '{','.join(header)}', expected '{','.join(LABELS_HEADER)}'"
                )
            for row in reader:
                if len(row) not in (0, 3):
                    raise UserError(f"{path} line {reader.line_num}: {len(row)} fields, expected 3")
                if row and row[0].strip() in rows:
                    raise UserError(f"{path} line {reader.line_num}: '{row[0].strip()}' has a row already")
                if row:
                    rows[row[0].strip()] = row[1].strip(), [name.strip() for name in row[2].split(";")][:5]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    absent = [name for name in ids if name not in rows]
    if absent:
        raise UserError(f"{path}: {len(absent)} of {len(ids)} boxed images have no row (first: {absent[0]})")
    if more := list(rows.keys() - set(ids)):
        report.note(f"row of {path.name} whose image has no box: not scored", min(more), len(more))
    labels = {rows[name][0] for name in ids}
    if labels.isdisjoint(other for name in ids for other in rows[name][1]):
        first = f"{ids[0]}: {rows[ids[0]][0]}, predicted {rows[ids[0]][1][0]}"
        report.problem(
            "image whose label is no image's predicted class: are both in the same words?", first, len(ids)
        )
    counts = {len(rows[name][1]) for name in ids}
    if len(counts) > 1:
        raise UserError(f"{path}: rows predict from {min(counts)} to {max(counts)} classes; give all as many")
    (count,) = counts
    places = [
        predicted.index(label) if label in predicted else count
        for label, predicted in map(rows.__getitem__, ids)
    ]
    return np.array(places), count


def paper_scores(
    files: Sequence[Path],
    truths: Sequence[np.ndarray],
    ranks: tuple[np.ndarray, int] | None,
    threshold: float,
    side: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics of maps against true boxes n × (k, 4) in pixels, and the best centred box's.

    Without `ranks`, see `read_ranks`, GT-known Loc alone. Where the predicted class is the true one, its map is too;
    elsewhere it does not count.
    """

    def box(path: Path) -> np.ndarray:
        return boxes_from_maps(read_map(path)[None], side, threshold)[0]

    overlap = best_iou(np.array(threaded(box, files, desc="boxes")), truths)
    centred = best_centred_box(truths, side)
    right = best_iou(np.repeat(centred[None], len(files), 0), truths) > IOU_RIGHT
    rank, count = (np.zeros(len(files), int), 1) if ranks is None else ranks
    images = {"rank": rank, "iou_gt": overlap, "iou_top1": overlap}
    images["num_classes"] = np.array(6 if count == 5 else 0)  # five of more classes: Top-5 Loc
    metrics = {name: float(values[0]) for name, values in rescore("wsol", images).items()}
    baseline = {"Top-1 Loc": (right & (rank == 0)).mean(), "GT-known Loc": right.mean()}
    if "Top-5 Loc" in metrics:
        baseline["Top-5 Loc"] = (right & (rank < 5)).mean()
    baseline = {name: float(value) for name, value in baseline.items()}
    if ranks is None:
        return {k: metrics[k] for k in ("GT-known Loc",)}, {k: baseline[k] for k in ("GT-known Loc",)}
    return metrics, baseline


def choe_scores(
    files: Sequence[Path], truths: Sequence[np.ndarray], masks: Sequence[Path], side: int
) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """MaxBoxAcc, MaxBoxAccV2 and PxAP, the best centred box's, and the curves; each map is read once."""

    def visit(number: int) -> tuple[Sweep | None, np.ndarray | int]:
        scaled = scaled_map(read_map(files[number]))
        counts = pixel_counts(scaled, read_mask(masks[number])) if masks else 0
        return sweep(scaled) if truths else None, counts

    sweeps, counts = zip(*threaded(visit, range(len(files)), desc="thresholds"))
    metrics, baseline, more = {}, {}, {}
    if truths:
        packed = box_statistics(sweeps, [pixel_truths(truth, side) for truth in truths])
        zeros = np.zeros(len(files))
        images = {"rank": zeros, "iou_gt": zeros, "iou_top1": zeros, "right_by_grey": packed}
        scores = rescore("wsol", images)
        metrics = {name: float(scores[name][0]) for name in ("MaxBoxAcc", "MaxBoxAccV2")}
        shares = centred_box_accuracies(truths, truths, side)
        baseline = {"MaxBoxAcc": shares[1], "MaxBoxAccV2": float(np.mean(shares))}
        more = {"choe2020": curves(packed)}
    if masks:
        metrics["PxAP"] = pixel_average_precision(np.sum(counts, axis=0))
        if np.isnan(metrics["PxAP"]):
            raise UserError(
                f"{masks[0].parent}: no mask has an object's pixel (value 255), so there is no PxAP"
            )
    return metrics, baseline, more


def show(scores: dict[str, Any]) -> None:
    """Print what was scored."""
    for name, value in scores["metrics"].items():
        box = scores["centred box"].get(name)
        print(
            f"{name}: {100 * value:.2f} %" + ("" if box is None else f" (best centred box {100 * box:.2f})")
        )
    print(
        f"{scores['images']} images. paper: threshold {scores['threshold']:g} of each map's maximum; choe2020: the "
        "best for these images. The centred box's size was chosen on these very boxes."
    )
    for line in scores["data"]:
        print(f"data: {line}")


if __name__ == "__main__":
    run_main(main)
