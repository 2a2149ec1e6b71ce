"""The evaluation report of captions: scores beside chance, lengths and vocabulary, the best and the worst."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from captioning.scoring import Scorer
from common.cell import Run
from common.data.types import CaptionSet
from common.metrics.captions import NAMES, per_image

SHOWN = 10  # best and worst captions


def make_report(
    metrics: Mapping[str, float | None],
    chance: Mapping[str, float],
    images: Mapping[str, np.ndarray],
    captions: Sequence[str],
    constant: str,
    scorer: Scorer,
    test_set: CaptionSet,
    vocabulary: int,
) -> dict[str, Any]:
    """What report.json holds: scores, statistics of lengths and words, the best and worst captions by CIDEr."""
    cider = per_image(images)["CIDEr"]
    order = np.argsort(-cider, kind="stable")
    words = [caption.split() for caption in captions]
    lengths = np.array([len(w) for w in words])
    used = {word for caption in words for word in caption}
    reference_lengths = [len(r.split()) for image in scorer.references for r in image]
    count = max(1, min(SHOWN, len(order) // 2))
    pick = {"best": order[:count], "worst": order[::-1][:count]}
    return {
        "metrics": dict(metrics),
        "chance": dict(chance),
        "chance caption": constant,
        "captions": {
            "images": len(captions),
            "mean words": round(float(lengths.mean()), 2),
            "shortest": int(lengths.min()),
            "longest": int(lengths.max()),
            "empty": int((lengths == 0).sum()),
            "mean words of references": round(float(np.mean(reference_lengths)), 2),
            "different captions": len(set(captions)),
            "different words": len(used),
            "vocabulary": vocabulary,
        },
        **{
            name: [
                {
                    "image_id": test_set.ids[i],
                    "CIDEr": round(float(cider[i]), 4),
                    "caption": captions[i],
                    "references": list(test_set.captions[i]),
                }
                for i in chosen
            ]
            for name, chosen in pick.items()
        },
    }


def scores_table(metrics: Mapping[str, float | None], chance: Mapping[str, float] | None = None) -> list[str]:
    """Scores × 100 as a Markdown table."""
    lines = [
        "| metric | score × 100 |" + (" chance |" if chance else ""),
        "|---|---|" + ("---|" if chance else ""),
    ]
    for name in NAMES:
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
    for name in ("best", "worst"):
        if report[name]:
            lines += ["", f"## The {name} captions by CIDEr", ""]
        for entry in report[name]:
            lines.append(
                f"- image {entry['image_id']}, {100 * entry['CIDEr']:.1f}: **{entry['caption'] or '(empty)'}**"
            )
            lines += [f"  - {reference}" for reference in entry["references"]]
    return "\n".join(lines)
