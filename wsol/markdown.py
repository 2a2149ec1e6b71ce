"""report.md of a run: readable alone."""

from typing import Any

from backbench.common.run.cell import Run

CHOE = ("MaxBoxAcc", "MaxBoxAccV2")


def as_markdown(run: Run, report: dict[str, Any], cost: dict[str, Any], count: int) -> str:
    """The scores of both protocols, what no image scores, the thresholds, IoUs, best and worst images."""
    identity, threshold = run.identity, report["threshold"]
    lines = [
        f"# WSOL by CAM: {identity.backbone} ({identity.arch}) on {identity.data}, seed {identity.seed}",
        "",
        f"{count} test images. Scores in per cent.",
        "",
        "| protocol | metric | score | chance | best centred box |",
        "|---|---|---|---|---|",
    ]
    for name, value in report["metrics"].items():
        box = report["centred box"].get(name)
        protocol = "choe2020" if name in CHOE else "paper"
        lines.append(
            f"| {protocol} | {name} | {100 * value:.2f} | {100 * report['chance'][name]:.2f} | "
            f"{'' if box is None else f'{100 * box:.2f}'} |"
        )
    lines += [
        "",
        "True boxes are cut to the test crop, which is what the maps show.",
        "",
        "paper: a box is right when its IoU with a true box is above .5; Top-1 Loc asks for the right class too, Top-5 "
        "Loc for the true class among the five best and a right box of its map, GT-known Loc for the box of the true "
        "class's map alone. choe2020: the same maps of the true class by the conventions of wsolevaluation; the "
        "threshold is the best of all for the scored images themselves, so its scores are of no held-out threshold.",
        "",
        "Chance: the same predictions, class and box together, shuffled over the images. Best centred box: no image is "
        f"looked at for it; its size was chosen on {report['centred box']['chosen on']}; the class is the network's.",
        "",
        f"Threshold of the paper's protocol: {threshold['value']:g} of each map's maximum, {threshold['chosen']}.",
        f"Recipe {identity.recipe}, trained with {run.recipe.method}: {cost['iterations']} iterations, "
        f"{cost['seconds']:.0f} s.",
        "",
        "![threshold curves](threshold_curve.svg)",
        "",
        "| choe2020: contour, IoU | best threshold | images right there |",
        "|---|---|---|",
    ]
    found = report["choe2020"]
    for name, place in found["best threshold"].items():
        lines.append(f"| {name} | {place:.3f} | {100 * max(found['curves'][name]):.2f} |")
    lines += [
        "",
        "MaxBoxAcc is the first row, MaxBoxAccV2 the mean of the others.",
        "",
        "| IoU, true class's map | images |",
        "|---|---|",
        *(f"| {name} | {number} |" for name, number in report["IoU histogram"].items()),
    ]
    if "curve" in threshold:
        curve = threshold["curve"]
        lines += ["", "| threshold, held-out images | GT-known Loc | mean IoU |", "|---|---|---|"]
        for value, right, mean in zip(curve["threshold"], curve["GT-known Loc"], curve["mean IoU"]):
            lines.append(f"| {value:.2f} | {100 * right:.1f} | {mean:.3f} |")
    for which, entries in report["best and worst"].items():
        lines += ["", f"{which.capitalize()} boxes among images with the right class:", ""]
        lines += [f"![{which}]({which}.jpg)", ""] if f"{which}.jpg" in report["pictures"] else []
        lines += [f"- {e['id']} ({e['class']}): IoU {e['IoU']:.3f}" for e in entries]
    return "\n".join([*lines, "", *(f"- {line}" for line in run.notes)])
