"""Score anyone's captions: COCO caption annotations against COCO caption results.

    python captioning/evaluate.py --annotations captions_val.json --results results.json --json scores.json

results.json is a list of {"image_id", "caption"}, one entry for every annotated image. --report DIR writes scores,
statistics and the best and the worst captions there, with --images FOLDER their pictures too.
"""

if __name__ == "__main__" and not __package__:  # run as a file: the root replaces this folder on the path
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backbench.captioning.report import (
    best_and_worst,
    captions_shown,
    scores_table,
    statistics,
    write_pictures,
)
from backbench.captioning.scoring import Scorer
from backbench.common.base.arguments import Parser, positive
from backbench.common.base.errors import UserError, run_main
from backbench.common.base.files import make_folder, read_json, write_json, write_text
from backbench.common.data.layout import Report, json_id, need_present, whole_text
from backbench.common.metrics.captions import NAMES, per_image, rescore


def main(argv: list[str] | None = None) -> int:
    """Read both files, score, print the table; write JSON where asked."""
    args = arguments().parse_args(argv)
    data = Report()
    references = read_annotations(args.annotations, data)
    captions = read_results(args.results, references, args.annotations, data)
    if args.images and not args.report:
        raise UserError("--images are shown in the report: give --report DIR too")
    paths = find_images(args.annotations, list(references), args.images) if args.images else None
    for path in filter(None, (args.json, args.per_image)):
        make_folder(path.parent)  # now, not after minutes of scoring
    with Scorer(list(references.values()), args.tokenizer, args.timeout, args.spice_jar) as scorer:
        images = scorer.statistics(list(captions.values()))
    notes = [*scorer.notes, *data.lines()]
    scores = {name: float(value[0]) for name, value in rescore(images).items()}
    names = [*NAMES, *(["SPICE"] if "SPICE" in scores else [])]
    for name in names:
        print(f"{name:8} {f'{100 * scores[name]:6.2f}' if name in scores else '   n/a'}")
    print(f"{len(captions)} images; scores × 100; " + "; ".join(notes))
    if args.json:
        write_json(args.json, {name: scores.get(name) for name in names})
    if args.per_image:
        single = per_image(images)
        rows = [
            {"image_id": key, "caption": caption, **{n: float(single[n][i]) for n in names if n in single}}
            for i, (key, caption) in enumerate(captions.items())
        ]
        write_json(args.per_image, rows)
    if args.report:
        write_report(args.report, scores, images, captions, references, scorer.references, paths, notes)
    return 0


def write_report(
    folder: Path,
    scores: dict[str, float],
    images: dict[str, Any],
    captions: dict[Any, str],
    references: dict[Any, list[str]],
    tokens: list[list[str]],
    paths: list[Path] | None,
    notes: list[str],
) -> None:
    """report.md and report.json: scores, statistics, the best and the worst captions."""
    said, ids = list(captions.values()), list(captions)
    report = {
        "metrics": scores,
        "captions": statistics(said, tokens),
        **best_and_worst(images, said, ids, list(references.values()), paths),
        "notes": notes,
    }
    make_folder(folder)
    if paths:
        write_pictures(folder, report)
    lines = ["# Captions scored", "", *scores_table(scores), "", *(f"- {line}" for line in notes)]
    lines += ["", "| captions | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in report["captions"].items()]
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", "\n".join([*lines, *captions_shown(report)]) + "\n")
    print(f"report: {folder / 'report.md'}")


def find_images(annotations: Path, ids: list[Any], folder: Path) -> list[Path]:
    """The image files of `ids`, by the annotations' list of images. Raises UserError when one is not there."""
    listed = read_json(annotations).get("images")
    names = {
        json_id(image.get("id")): image["file_name"]
        for image in (listed if isinstance(listed, list) else [])
        if isinstance(image, dict) and isinstance(image.get("file_name"), str)
    }
    absent = [key for key in ids if key not in names]
    if absent:
        raise UserError(
            f"{annotations}: 'images' gives no file_name of image {absent[0]}, which --images needs"
        )
    paths = [folder / names[key] for key in ids]
    need_present(annotations, "images", paths)
    return paths


def arguments() -> argparse.ArgumentParser:
    """The command line of this script."""
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--annotations", type=Path, required=True, help="COCO caption annotations: the references"
    )
    made.add_argument(
        "--results", type=Path, required=True, help='the captions: [{"image_id": …, "caption": …}, …]'
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores as fractions (pycocoevalcap's scale)"
    )
    made.add_argument("--per-image", type=Path, metavar="FILE", help="write every image's scores")
    made.add_argument("--report", type=Path, metavar="DIR", help="write a report to read there")
    made.add_argument("--images", type=Path, metavar="DIR", help="the images, for the report")
    made.add_argument(
        "--spice-jar",
        type=Path,
        metavar="FILE",
        help="score SPICE too: its spice-1.0.jar, lib/ beside it (default: $BACKBENCH_SPICE)",
    )
    made.add_argument(
        "--timeout", type=positive, default=120.0, help="seconds to wait for an answer of Java (default: 120)"
    )
    made.add_argument(
        "--tokenizer",
        choices=("auto", "ptb", "plain"),
        default="auto",
        help="ptb (through Java), plain (nltk's Treebank rules), or ptb where there is Java (default)",
    )
    return made


def read_annotations(path: Path, report: Report) -> dict[int | str, list[str]]:
    """Image id → its reference captions; what was changed is in `report`.

    Raises UserError when the file is not COCO caption annotations.
    """
    content = read_json(path)
    entries = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UserError(f"{path}: has no list 'annotations'; expected COCO caption annotations")
    references: dict[int | str, list[str]] = {}
    for key, caption in _entries(entries, f"{path}: annotations", report):
        references.setdefault(key, []).append(caption)
    if not references:
        raise UserError(f"{path}: 'annotations' is empty, there is nothing to score against")
    return references


def read_results(
    path: Path, references: dict[int | str, list[str]], annotations: Path, report: Report
) -> dict[int | str, str]:
    """Image id → caption, in the order of `references`; what was changed is in `report`.

    Raises UserError for a file of another kind, and for images that are unknown, missing or doubled.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise UserError(
            f'{path}: holds a {type(content).__name__}, expected a list of {{"image_id", "caption"}}'
        )
    if not content:
        raise UserError(f"{path}: holds no captions")
    captions: dict[int | str, str] = {}
    doubled, unknown = [], []
    for key, caption in _entries(content, f"{path}: entry", report):
        if key in captions:
            doubled.append(key)
        elif key not in references:
            unknown.append(key)
        captions[key] = caption
    missing = [key for key in references if key not in captions]
    for what, keys in (
        (f"without a reference in {annotations}", unknown),
        ("given twice", doubled),
        (f"of {annotations} without a caption", missing),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"{path}: image {', '.join(map(repr, keys[:3]))}{more} {what}; every image needs one caption"
            )
    return {key: captions[key] for key in references}


def _entries(entries: list[Any], where: str, report: Report) -> Iterator[tuple[int | str, str]]:
    """Image id and caption of each entry. Halves of surrogate pairs, which no file can hold, are replaced and noted."""
    for number, entry in enumerate(entries):
        value = entry.get("image_id") if isinstance(entry, dict) else None
        key = json_id(value)
        if key is None:
            held = "missing" if value is None else f"{value!r:.60}"
            raise UserError(f"{where} {number}: 'image_id' is {held}; expected an integer or text")
        caption = entry.get("caption")
        if not isinstance(caption, str):
            raise UserError(f"{where} {number} (image {key}) has no text under 'caption'")
        if whole_text(caption) != caption:
            report.note("caption with half a surrogate pair: U+FFFD in its place", f"{where} {number}")
        yield key, whole_text(caption)


if __name__ == "__main__":
    run_main(main)
