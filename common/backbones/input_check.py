"""Which input do these weights want? Batch statistics of a task's own images against the stored ones.

Key names and shapes say nothing of the scale of the input or of the convolution that carries a bottleneck's stride:
a wrong reading loads without a word and costs accuracy ever after. Batch norm remembers what its input looked like in
pretraining; the reading under which 64 images of the task look most like that is the one that fits.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbench.common.backbones.load import IMAGENET_MEAN, IMAGENET_STD, Backbone
from backbench.common.backbones.resnet import STAGES, normalise
from backbench.common.base.cache import cache_folder
from backbench.common.base.files import digest, read_json, write_json
from backbench.common.data.decode import Fit, read_rgb
from backbench.common.data.types import hash_order

PROTOCOL = 2  # raise it when the meaning of a number below changes
IMAGES, CHUNK, LARGEST = 64, 16, 224
FEWEST = 16  # images, below which nothing is said
NEAR = 0.4  # distance of weights that know such images: 0.05 to 0.2 measured on photos, 1.4 on microscopy
CLEARLY = 0.7  # another reading fits clearly better below this share of the given one's distance …
ANYHOW = 0.25  # … if it is near, or below this share wherever it lies
ALIKE = 0.9  # a reading cannot be told from one whose distance is at least this share of its own
FURTHEST = 3.0  # a channel's distance counts at most as much: dead channels have any
# With the first layer this near, a stage this far, in absolute numbers and in multiples of the first, has other layers
# before it: 0.7 to 3.0 measured with SiLU, blur pooling or gates, at most 0.45 without
KNOWN, ASTRAY, TIMES = 0.2, 0.6, 3.0
COLLAPSED = 0.003  # spread of layer4 below which the features hardly depend on the image
CAFFE_MEAN = (0.485, 0.458, 0.408)  # 123.68, 116.779, 103.939 of 255


@dataclass(frozen=True)
class Reading:
    """An input scale: RGB/255 less `mean`, over `std`, its channels then reversed if `bgr`."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool = False

    @property
    def flags(self) -> str:
        """The command-line arguments that ask for it."""
        mean, std = (",".join(f"{v:.6g}" for v in values) for values in (self.mean, self.std))
        return f"--input-mean {mean} --input-std {std}" + (" --bgr" if self.bgr else "")


READINGS = (
    Reading("RGB/255 with ImageNet's mean and std", IMAGENET_MEAN, IMAGENET_STD),
    Reading("BGR/255 with ImageNet's mean and std", IMAGENET_MEAN, IMAGENET_STD, True),
    Reading("BGR 0 to 255 less the mean (Caffe)", CAFFE_MEAN, (1 / 255,) * 3, True),
    Reading("RGB 0 to 255 less the mean", CAFFE_MEAN, (1 / 255,) * 3),
    Reading("RGB 0 to 1", (0.0,) * 3, (1.0,) * 3),
    Reading("RGB -1 to 1", (0.5,) * 3, (0.5,) * 3),
)


@torch.inference_mode()
def bn_distances(
    run: Callable[[Tensor], Any], body: nn.Module, batches: Iterable[Tensor]
) -> dict[str, float]:
    """How far the inputs of each batch norm that `run` reaches lie from its stored statistics, by its name.

    A channel's distance is |m − μ|/σ + |ln(s/σ)| of its batch mean and deviation m, s and the stored μ, σ, at most
    `FURTHEST`; a layer's is the mean over its channels. The body is in eval mode; nothing of it changes.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
            mean = mean.double()
            moments = len(inputs[0]) * torch.stack([torch.ones_like(mean), mean, var + mean**2])
            sums[name] = sums.get(name, 0) + moments

        return hook

    norms = {name: m for name, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
    handles = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (count, total, squares) in sums.items():
        norm = norms[name]
        mean = total / count  # of images: all have the same size
        deviation = ((squares / count - mean**2).clamp(min=0) + norm.eps).sqrt()
        sigma = (norm.running_var.double() + norm.eps).sqrt()
        far = (mean - norm.running_mean.double()).abs() / sigma + (deviation / sigma).log().abs()
        found[name] = float(far.nan_to_num(FURTHEST).clamp(max=FURTHEST).mean())
    return found


def adoption_report(
    backbone: Backbone, train_set: Any, device: torch.device, size: int = LARGEST
) -> dict[str, Any]:
    """The report on `IMAGES` images of a training set (any of the three kinds), computed once and kept.

    The images are cut to the smaller of `size` and the weights' own input size, at most `LARGEST` pixels. JSON-able:
    `inputs` and `strides`, each a list of candidates with its "distance" (see `bn_distances`; over the stem and layer1,
    which know nothing of strides, and over the three 3×3 layers behind the strides), `stages` with their "spread" (the
    deviation between images over the mean, of pooled features), "dead" share of channels and "distance" under what fits
    best, `verdict` and `warnings`:
    lines. Draws no random number and leaves the backbone as it is.
    """
    size = min(size, backbone.input_size, LARGEST)
    given = [backbone.mean, backbone.std, backbone.bgr, backbone.stride_in_1x1]
    key = digest("adoption", PROTOCOL, backbone.fingerprint, given, train_set.fingerprint, size)
    path = cache_folder("adoption") / f"{key}.json"
    if not path.exists():
        write_json(path, measure(backbone, _images(train_set, size), device))
    return read_json(path)


def measure(backbone: Backbone, images: np.ndarray, device: torch.device) -> dict[str, Any]:
    """The report from uint8 images (n, H, W, 3); see `adoption_report`."""
    trunk = copy.deepcopy(backbone.trunk).to(device).eval()
    batches = [batch.to(device) for batch in torch.from_numpy(np.array(images)).split(CHUNK)]

    def prepared(reading: Reading) -> Iterable[Tensor]:
        for batch in batches:
            x = normalise(batch, reading.mean, reading.std)
            same = reading.bgr == backbone.bgr  # the first layer of a BGR backbone is reversed already
            yield x if same else x.flip(1)

    given = Reading("the given input", backbone.mean, backbone.std, backbone.bgr)
    known = [r for r in READINGS if not _same(r, given)]
    given = next((r for r in READINGS if _same(r, given)), given)
    inputs = []
    for reading in (given, *known):
        layers = bn_distances(lambda x: trunk.run(x, stop="layer1"), trunk, prepared(reading))
        flags = reading.flags + (" --no-bgr" if backbone.bgr and not reading.bgr else "")
        inputs.append({"name": reading.name, "distance": _mean(layers), "flags": flags})
    fitting = min((given, *known), key=lambda r: next(i["distance"] for i in inputs if i["name"] == r.name))
    pooled: list[dict[str, Tensor]] = []

    def look(x: Tensor) -> None:
        pooled.append({k: v.mean((2, 3)) for k, v in trunk.features(x, STAGES).items()})

    strides, passes = [], []
    given_stride = "1x1" if backbone.stride_in_1x1 else "3x3"
    for name in sorted(("3x3", "1x1") if trunk.has_1x1 else ("3x3",), key=lambda n: n != given_stride):
        layers = bn_distances(trunk if passes else look, trunk, prepared(fitting))
        passes.append(layers)
        if trunk.has_1x1:
            behind = _mean({f"{stage}.0.bn2": layers[f"{stage}.0.bn2"] for stage in STAGES[2:]})
            strides.append({"name": name, "distance": behind})
            trunk.swap_strides()
    nearest = min(zip(strides, passes), key=lambda p: p[0]["distance"])[1] if strides else passes[0]
    if fitting is not given:
        pooled.clear()
        with torch.inference_mode():
            for x in prepared(given):
                look(x)
    stages = {
        stage: {
            **_spread(torch.cat([p[stage] for p in pooled])),
            "distance": _mean(_of_stage(nearest, stage)),
        }
        for stage in STAGES
    }
    report = {
        "images": len(images),
        "size": images.shape[1],
        "inputs": inputs,
        "strides": strides,
        "stages": stages,
    }
    return {**report, **_judge(report)}


def _same(a: Reading, b: Reading) -> bool:
    return a.bgr == b.bgr and np.allclose([*a.mean, *a.std], [*b.mean, *b.std], atol=1e-3)


def _mean(distances: dict[str, float]) -> float:
    return round(sum(distances.values()) / len(distances), 3)


def _of_stage(layers: dict[str, float], stage: str) -> dict[str, float]:
    first = "bn1" if stage == "stem" else f"{stage}."
    return {name: distance for name, distance in layers.items() if name.startswith(first)}


def _images(train_set: Any, size: int) -> np.ndarray:
    fit = Fit(size, size, short=round(size * 8 / 7))
    read = getattr(train_set, "read", None) or (lambda i: read_rgb(train_set.paths[i]))
    return np.stack([fit(read(i)) for i in hash_order(train_set.ids)[:IMAGES]])


def _spread(features: Tensor) -> dict[str, float]:
    features = features.double()
    spread = features.std(0, correction=0).mean() / features.abs().mean().clamp(min=1e-12)
    dead = (features == 0).all(0).double().mean()
    return {"spread": round(float(spread), 3), "dead": round(float(dead), 3)}


def _judge(report: dict[str, Any]) -> dict[str, list[str]]:
    if report["images"] < FEWEST:
        return {
            "verdict": [f"cannot tell how the weights read their input from {report['images']} images"],
            "warnings": [],
        }
    verdict, warnings = [], []
    strides = [
        {**s, "name": f"stride in the {s['name']}", "flags": flag}
        for s in report["strides"]
        for flag in ["--stride-in-1x1" if s["name"] == "1x1" else "--no-stride-in-1x1"]
    ]
    for candidates in (report["inputs"], strides):
        if candidates:
            line, warns = _compare(candidates)
            (warnings if warns else verdict).append(line)
    line = None if warnings else _astray({k: v["distance"] for k, v in report["stages"].items()})
    warnings += [line] if line else []
    if report["stages"]["layer4"]["spread"] < COLLAPSED:
        warnings.append(
            "layer4's features hardly differ between images: collapsed weights, or a wrong input scale"
        )
    return {"verdict": verdict, "warnings": warnings}


def _astray(stages: dict[str, float]) -> str | None:
    """A warning where the first layer knows these images and a later stage does not."""
    first = stages["stem"]
    far = [s for s in STAGES[1:] if stages[s] > max(ASTRAY, TIMES * first)] if first <= KNOWN else []
    if not far:
        return None
    away = ", ".join(f"{stage} {stages[stage]:.2f}" for stage in far)
    return (
        f"the first layer fits ({first:.2f}), but {away} away from their batch-norm statistics: these weights had "
        "other layers between them (another activation, gates, blur pooling, dilation), or statistics not their own"
    )


def _compare(candidates: list[dict[str, Any]]) -> tuple[str, bool]:
    """One line about the given reading, the first of the candidates, and whether it is a warning."""
    given, best = candidates[0], min(candidates, key=lambda c: c["distance"])
    d, nearest = given["distance"], best["distance"]
    if nearest < ANYHOW * d or (nearest < CLEARLY * d and nearest <= NEAR):
        line = f"{best['name']} fits these weights better than {given['name']} ({nearest:.2f} against {d:.2f} away from"
        return f"{line} their batch-norm statistics); try {best['flags']}", True
    if nearest > NEAR:
        return (
            f"cannot tell whether {given['name']} fits: these images are far from the weights' own ({d:.2f})",
            False,
        )
    if nearest < ALIKE * d:
        return f"cannot tell whether {given['name']} ({d:.2f}) or {best['name']} ({nearest:.2f}) fits", False
    alike = [c["name"] for c in candidates[1:] if d >= ALIKE * c["distance"]]
    return f"{given['name']} fits ({d:.2f})" + (f", as well as {', '.join(alike)}" if alike else ""), False
