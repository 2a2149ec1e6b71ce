"""The evaluation report of captions: scores beside chance, lengths and vocabulary, the best and the worst."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backbench.common.base.files import make_folder
from backbench.common.data.decode import read_rgb
from backbench.common.data.pictures import shrink, write_jpeg
from backbench.common.metrics.captions import NAMES, per_image
from backbench.common.run.cell import Run

SHOWN = 10  # best and worst captions
SIDE = 320  # pixels of their pictures, the longer side


def statistics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Counts and lengths in words of captions beside those of their tokenised references."""
    words = [caption.split() for caption in captions]
    lengths = np.array([len(w) for w in words])
    reference_words = [r.split() for image in references for r in image]
    used = Counter(word for caption in words for word in caption)
    return {
        "images": len(captions),
        "mean words": round(float(lengths.mean()), 2),
        "mean words of references": round(float(np.mean([len(r) for r in reference_words])), 2),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "captions of each length": ", ".join(
            f"{k}: {v}" for k, v in sorted(Counter(lengths.tolist()).items())
        ),
        "empty": int((lengths == 0).sum()),
        "different captions": len(set(captions)),
        "different words": len(used),
        "different words of references": len({word for r in reference_words for word in r}),
        "most used words": ", ".join(word for word, _ in used.most_common(10)),
    }


def best_and_worst(
    images: Mapping[str, np.ndarray],
    captions: Sequence[str],
    ids: Sequence[Any],
    references: Sequence[Sequence[str]],
    paths: Sequence[Path] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """The best and the worst captions by CIDEr, of the per-image statistics `images`, with their references."""
    cider = per_image(images)["CIDEr"]
    order = np.argsort(-cider, kind="stable")
    count = max(1, min(SHOWN, len(order) // 2))
    return {
        name: [
            {
                "image_id": ids[i],
                "CIDEr": round(float(cider[i]), 4),
                "caption": captions[i],
                "references": list(references[i]),
                **({"file": str(paths[i])} if paths else {}),
            }
            for i in chosen
        ]
        for name, chosen in {"best": order[:count], "worst": order[::-1][:count]}.items()
    }


def write_pictures(folder: Path, report: dict[str, Any]) -> None:
    """Put the images of the best and the worst captions below `folder`; their `file` becomes `picture`."""
    target = make_folder(folder / "pictures")
    for old in target.glob("*.jpg"):
        old.unlink()
    entries = [entry for name in ("best", "worst") for entry in report[name]]
    for number, entry in enumerate(entries):
        entry["picture"] = f"pictures/{number}.jpg"
        write_jpeg(folder / entry["picture"], shrink(read_rgb(Path(entry.pop("file"))), SIDE))


def scores_table(metrics: Mapping[str, float | None], chance: Mapping[str, float] | None = None) -> list[str]:
    """Scores × 100 as a Markdown table."""
    lines = [
        "| metric | score × 100 |" + (" chance |" if chance else ""),
        "|---|---|" + ("---|" if chance else ""),
    ]
    for name in (*NAMES, *(name for name in metrics if name not in NAMES)):
        value = metrics.get(name)
        cells = [name, "n/a" if value is None else f"{100 * value:.1f}"]
        if chance:
            cells.append(f"{100 * chance[name]:.1f}" if name in chance else "n/a")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def as_markdown(run: Run, report: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    """The report to read: report.md."""
    who = run.identity
    lines = [
        f"# Captioning with {who.model.upper()} on {who.data}: {who.backbone}, recipe {who.recipe}, seed {who.seed}",
        "",
        *scores_table(report["metrics"], report["chance"]),
        "",
        f"Chance: the most frequent training caption for every image (“{report['chance caption']}”), scored alike. "
        "CIDEr is CIDEr-D, as everywhere in the field.",
        f"Training: {cost['iterations']} iterations, {cost['seconds']:.0f} s.",
        "",
        *(f"- {line}" for line in run.notes),
        "",
        "| captions | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in report["captions"].items()),
    ]
    return "\n".join([*lines, *captions_shown(report)])


def captions_shown(report: Mapping[str, Any]) -> list[str]:
    """The best and the worst captions as Markdown, with pictures where they were written."""
    lines = []
    for name in ("best", "worst"):
        if report[name]:
            lines += ["", f"## The {name} captions by CIDEr"]
        for entry in report[name]:
            if "picture" in entry:
                lines += ["", f"![]({entry['picture']})"]
            said = entry["caption"] or "(empty)"
            lines += ["", f"- image {entry['image_id']}, {100 * entry['CIDEr']:.1f}: **{said}**"]
            lines += [f"  - {reference}" for reference in entry["references"]]
    return lines
