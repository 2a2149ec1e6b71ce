"""From a test's answers to its cell: statistics by image, scores, chance, curves, intervals, the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from backbench.common.base.files import write_text
from backbench.common.engine import SPLIT, stream
from backbench.common.metrics import ood, rescore
from backbench.common.report.curve_svg import curve_svg
from backbench.common.run.cell import Run
from backbench.pretrain.recipes import RobustnessRecipe
from backbench.pretrain.stress import hole_sides

PRIMARY = {"fgsm": "top-1 attacked", "occlusion": "top-1 occluded", "between": "either class", "ood": "AUROC"}
DRAWS, AT_ONCE = 400, 4_000_000  # bootstrap draws of the report's intervals; numbers in memory together
RATES = np.linspace(0, 1, 101)  # false positive rates of a drawn ROC curve

Arrays = Mapping[str, np.ndarray]


def statistics(test: str, answers: Arrays, truth: Arrays) -> dict[str, np.ndarray]:
    """Per-image statistics (see `common.metrics.robustness.rescore`) of a test's answers (see `pretrain.stress`).

    `truth`: "labels" int (n,), indices of the network's classes; in-between: "pairs" (p, 2); out of distribution: "set"
    (n,) and "sets" instead.
    """
    if test == "ood":
        return {"confidence": answers["confidence"], "set": truth["set"], "sets": truth["sets"]}
    labels = truth["labels"]
    if test == "fgsm":
        return {f"right_{kind}": answers[kind] == labels for kind in ("attacked", "clean")}
    if test == "occlusion":
        return {f"right_{kind}": answers[kind] == labels[:, None] for kind in ("centre", "boundary")}
    first, second = truth["pairs"].T
    either = {
        f"either_{kind}": (answers[kind] == labels[first][:, None])
        | (answers[kind] == labels[second][:, None])
        for kind in ("mixup", "cutmix")
    }
    return {**either, "first": first.astype(np.int32), "second": second.astype(np.int32)}


def chance(test: str, answers: Arrays, truth: Arrays, rounds: int = 20) -> dict[str, float]:
    """The scores when every image's answer (in-between: every pair's) goes to a random other; mean over `rounds`."""
    rng, scores = stream(SPLIT, 0), []
    for _ in range(rounds):
        order = rng.permutation(len(next(iter(answers.values()))))
        shuffled = {name: values[order] for name, values in answers.items()}
        scores.append(rescore("robustness", statistics(test, shuffled, truth)))
    return {name: float(np.mean([score[name][0] for score in scores])) for name in scores[0]}


def charts(test: str, found: Arrays, recipe: RobustnessRecipe) -> list[dict[str, Any]]:
    """Curves as plain values, fractions: the paper's Figure 5 (errors), or an ROC curve of each set."""
    holes = [side / recipe.size for side in hole_sides(recipe.size, recipe.holes)]
    if test == "occlusion":
        curves = {f"{kind} hidden": error(found[f"right_{kind}"]) for kind in ("centre", "boundary")}
        return [
            chart("top-1 error of occluded images", "side of the hole, share of the image's", holes, curves)
        ]
    if test == "between":
        shares = [k / recipe.lambdas for k in range(recipe.lambdas + 1)]
        axes = {"mixup": (shares, "1 − λ"), "cutmix": (holes, "side of the hole, share of the image's")}
        names = {"mixup": "Mixup", "cutmix": "CutMix"}
        return [
            chart("neither class predicted", across, x, {names[kind]: error(found[f"either_{kind}"])})
            for kind, (x, across) in axes.items()
        ]
    if test == "ood":
        return [chart("test images accepted", "other images accepted", RATES.tolist(), roc_curves(found))]
    return []


def chart(
    title: str, across: str, x: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """One picture: `curves` by name over `x`, all in [0, 1]."""
    return {"title": title, "across": across, "x": list(x), "curves": dict(curves)}


def error(right: np.ndarray) -> list[float]:
    """1 − the mean of each column."""
    return (1 - right.mean(0)).tolist()


def roc_curves(found: Arrays) -> dict[str, list[float]]:
    """True positive rate at `RATES` of false positives, by set."""
    curves = {}
    for number, name in enumerate(map(str, found["sets"]), start=1):
        true, false = ood.roc(*(found["confidence"][found["set"] == k] for k in (0, number)))
        at = np.searchsorted(false[0], RATES, side="right") - 1  # the last point that accepts no more
        curves[name] = true[0, at].tolist()
    return curves


def intervals(images: Arrays) -> dict[str, tuple[float, float]]:
    """The middle 95 % of each score under `DRAWS` bootstrap draws of the images."""
    count, rng = len(images["ids"]), stream(SPLIT, 0)
    rows = max(1, AT_ONCE // count)
    blocks = []
    for start in range(0, DRAWS, rows):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(rows, DRAWS - start))
        blocks.append(rescore("robustness", images, weights.astype(np.float64)))
    return {
        name: tuple(
            np.nanquantile(np.concatenate([block[name] for block in blocks]), (0.025, 0.975)).tolist()
        )
        for name in blocks[0]
    }


def finish(
    run: Run,
    test: str,
    answers: Arrays,
    truth: Arrays,
    ids: Sequence[str],
    lines: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """Score the answers, write curves_N.svg, the report and the cell; what is in its report.json."""
    images = {"ids": np.array(ids), **statistics(test, answers, truth)}
    found = {
        "metrics": {k: float(v[0]) for k, v in rescore("robustness", images).items()},
        "chance": chance(test, answers, truth),
        "charts": charts(test, images, run.recipe),
    }
    names = [f"curves_{number}.svg" for number, _ in enumerate(found["charts"], start=1)]
    with run.stage("score", files=names):
        for name, one in zip(names, found["charts"]):
            series = [(label, np.array(one["x"]), np.array(ys)) for label, ys in one["curves"].items()]
            write_text(run.folder / name, curve_svg(f"{one['title']}, %", one["across"], series))
    run.finish(
        metrics=found["metrics"],
        chance=found["chance"],
        primary=PRIMARY[test],
        images=images,
        report=found,
        report_md="\n".join(markdown(run, found, intervals(images), lines)),
        device=device,
        cost={},
    )
    return found


def markdown(
    run: Run, found: Mapping[str, Any], bounds: Mapping[str, tuple[float, float]], lines: Sequence[str]
) -> list[str]:
    """The lines of report.md."""
    i = run.identity
    text = [
        f"# {i.backbone}: {i.model} of {i.arch} on {i.data}",
        "",
        "| metric | score | 95 % interval | chance |",
        "|---|---|---|---|",
    ]
    for name, value in found["metrics"].items():
        low, high = (100 * bound for bound in bounds[name])
        text.append(
            f"| {name} | {100 * value:.2f} | {low:.2f} to {high:.2f} | {100 * found['chance'][name]:.2f} |"
        )
    text += ["", *lines, "", f"The interval is over test images alone ({DRAWS} bootstrap draws)."]
    for one in found["charts"]:
        text += ["", f"![](curves_{found['charts'].index(one) + 1}.svg)"]
        if i.model == "ood":
            continue  # a hundred rows: the picture and report.json have them
        heads = [one["across"], *(f"{one['title']}, {label}" for label in one["curves"])]
        text += ["", f"| {' | '.join(heads)} |"]
        text.append("|---" * (1 + len(one["curves"])) + "|")
        for x, *ys in zip(one["x"], *one["curves"].values()):
            text.append(f"| {x:.3g} | {' | '.join(f'{100 * y:.2f}' for y in ys)} |")
    return [*text, "", *(f"- {note}" for note in run.notes)]
