"""Score anyone's localisation maps: one .npy of 2-D scores an image, named as in the box list.

    python wsol/evaluate.py --scoremaps DIR --boxes FILE [--labels FILE] [--json FILE]

FILE of boxes: rows `path,x0,y0,x1,y1` in shares of the image, several an image. The map of `val/dog/1.jpg` is
DIR/val/dog/1.jpg.npy or DIR/val/dog/1.npy and shows the true class. FILE of labels: rows `path,label,predicted`,
wanted for Top-1 Loc. A map covers its whole image, unless --resize and --crop say of which centre crop it is.
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

import numpy as np

from common.data.boxes import read_box_csv
from common.data.layout import Report, need_folder
from common.errors import UserError, run_main
from common.files import write_json
from common.metrics import rescore
from common.metrics.localisation import IOU_RIGHT, best_centred_box, best_iou
from wsol.boxes import boxes_from_maps, to_crop

LABELS_HEADER = ["path", "label", "predicted"]


def main(argv: list[str] | None = None) -> int:
    """Arguments → maps and true boxes → boxes → scores, printed and, with --json, written."""
    args = arguments().parse_args(argv)
    if (args.resize is None) != (args.crop is None):
        raise UserError("--resize and --crop belong together (the paper's are 256 and 224)")
    resize, crop = (args.resize, args.crop) if args.crop else (args.size, args.size)
    if not 0 < crop <= resize or not 0 <= args.threshold < 1:
        raise UserError("needed: 0 < --crop <= --resize, --size above 0 and --threshold from 0 to below 1")
    report = Report()
    shares = read_box_csv(args.boxes, report)
    need_folder(args.scoremaps, "one .npy of 2-D scores an image, named as in the box list")
    files = map_files(args.scoremaps, list(shares))
    correct = read_labels(args.labels, list(shares)) if args.labels else None
    scores = score(files, list(shares.values()), correct, args.threshold, resize, crop)
    scores |= {"data": report.lines()}
    for name, value in scores["metrics"].items():
        print(f"{name}: {100 * value:.2f} %")
    print(
        f"best centred box, its size chosen on these very boxes: GT-known Loc {100 * scores['centred box']:.2f} %\n"
        f"{len(files)} images, threshold {args.threshold:g} of each map's maximum"
    )
    for line in scores["data"]:
        print(f"data: {line}")
    if args.json:
        write_json(args.json, scores)
    return 0


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--scoremaps", type=Path, required=True, metavar="DIR", help="folder of .npy maps")
    made.add_argument(
        "--boxes", type=Path, required=True, metavar="FILE", help="true boxes, path,x0,y0,x1,y1"
    )
    made.add_argument("--labels", type=Path, metavar="FILE", help="path,label,predicted: for Top-1 Loc")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the scores there")
    made.add_argument(
        "--threshold", type=float, default=0.15, help="share of a map's maximum (default: .15, the paper's)"
    )
    made.add_argument("--size", type=int, default=224, help="side to which maps are enlarged (default: 224)")
    made.add_argument(
        "--resize", type=int, help="maps are of a centre crop of the image squeezed to this side …"
    )
    made.add_argument("--crop", type=int, help="… and this is the crop's side (paper: 256, 224)")
    return made


def map_files(folder: Path, ids: Sequence[str]) -> list[Path]:
    """The .npy file of each image: ID.npy, else ID without its ending + .npy. UserError naming the first absent."""
    files, absent = [], []
    for name in ids:
        tried = [folder / f"{name}.npy", (folder / name).with_suffix(".npy")]
        there = [path for path in tried if path.is_file()]
        files += there[:1]
        if not there:
            absent.append(tried[0])
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(ids)} maps are absent (first: {absent[0]})")
    return files


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


def read_labels(path: Path, ids: Sequence[str]) -> np.ndarray:
    """Whether each image's class was predicted rightly: bool (n,). Raises UserError with file and line."""
    right: dict[str, bool] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = [cell.strip() for cell in next(rows, [])]
            if header != LABELS_HEADER:
                raise UserError(
                    f"{path} line 1: header is '{','.join(header)}', expected '{','.join(LABELS_HEADER)}'"
                )
            for row in rows:
                if len(row) not in (0, 3):
                    raise UserError(f"{path} line {rows.line_num}: {len(row)} fields, expected 3")
                if row:
                    right[row[0].strip()] = row[1].strip() == row[2].strip()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    absent = [name for name in ids if name not in right]
    if absent:
        raise UserError(f"{path}: {len(absent)} of {len(ids)} boxed images have no row (first: {absent[0]})")
    return np.array([right[name] for name in ids])


def score(
    files: Sequence[Path],
    shares: Sequence[np.ndarray],
    correct: np.ndarray | None,
    threshold: float,
    resize: int,
    crop: int,
) -> dict[str, Any]:
    """The metrics of maps against true boxes (shares, n × (k, 4)); without `correct` (n,) GT-known Loc alone."""
    boxes = np.concatenate([boxes_from_maps(read_map(path)[None], crop, threshold) for path in files])
    truths = [to_crop(part, resize, crop) for part in shares]
    overlap = best_iou(boxes, truths)
    rank = np.zeros(len(files), int) if correct is None else (~correct).astype(int)
    metrics = {
        k: float(v[0])
        for k, v in rescore("wsol", {"rank": rank, "iou_gt": overlap, "iou_top1": overlap}).items()
    }
    centred = best_centred_box(truths, crop)
    return {
        "metrics": metrics if correct is not None else {"GT-known Loc": metrics["GT-known Loc"]},
        "centred box": float((best_iou(np.repeat(centred[None], len(files), 0), truths) > IOU_RIGHT).mean()),
        "images": len(files),
        "threshold": threshold,
        "frame": {"resize": resize, "crop": crop},
    }


if __name__ == "__main__":
    run_main(main)
