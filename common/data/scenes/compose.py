"""What is in a picture: kinds, sizes and places of objects, sampled from a generator."""

import math
from dataclasses import replace

import numpy as np

from backbench.common.data.scenes.draw import COLOURS, SETTINGS, Scene, Seen, Thing, render
from backbench.common.data.scenes.shapes import CLASSES

SEED = 2**31
# small, middle and big, by the number of objects in the picture
RADII = {
    1: ((0.13, 0.155), (0.18, 0.25), (0.28, 0.44)),
    2: ((0.13, 0.155), (0.18, 0.24), (0.28, 0.34)),
    3: ((0.12, 0.15), (0.17, 0.23), (0.265, 0.29)),
    4: ((0.12, 0.15), (0.17, 0.23), (0.265, 0.29)),
}
SMALL, BIG = 0.16, 0.26  # radii in shares of the shorter side: below is small, above is big


def portrait(rng: np.random.Generator, kind: str, side: int) -> tuple[Scene, np.ndarray, Seen]:
    """A square picture of one object, somewhere, sometimes cut or behind leaves."""
    radius = rng.uniform(0.28, 0.46) * side
    thing = _thing(rng, kind, side, side, radius, ())
    return _show(rng, side, side, (thing,), rng.random() < 0.3, keep=0.0)


def group(
    rng: np.random.Generator, width: int, height: int, *, keep: float, tiny: float = 0.0
) -> tuple[Scene, np.ndarray, list[Seen]]:
    """A picture of one to four objects that may overlap and be cut.

    An object of which less than the share `keep` can be seen is left out of the picture. `tiny` is the chance
    that an object is very small.
    """
    side = min(width, height)
    count = int(rng.choice(4, p=(0.28, 0.34, 0.23, 0.15))) + 1
    things: list[Thing] = []
    for _ in range(count):
        low, high = RADII[count][int(rng.choice(3, p=(0.15, 0.45, 0.4)))]
        if rng.random() < tiny:
            low, high = 0.04, 0.06
        kind, colour = str(rng.choice(CLASSES)), None
        if things and rng.random() < 0.3:
            kind = things[-1].kind
            colour = things[-1].colour if rng.random() < 0.5 else None
        things.append(_thing(rng, kind, width, height, rng.uniform(low, high) * side, things, colour))
    return _show(rng, width, height, tuple(things), rng.random() < 0.25, keep)


def _thing(rng, kind, width, height, radius, others, colour=None) -> Thing:
    """An object at a place where it is mostly inside and, if one is found, does not hide the others much."""
    inset = radius * (0.9 if rng.random() < 0.88 else 0.5)  # else probably cut by the border
    for _ in range(30):
        x, y = (float(rng.uniform(min(inset, n / 2), max(n - inset, n / 2))) for n in (width, height))
        if all(math.dist((x, y), (o.x, o.y)) > 0.8 * (radius + o.radius) for o in others):
            break
    colour = colour or str(rng.choice(list(COLOURS)))
    angle = float(np.clip(rng.normal(0, 0.25), -0.7, 0.7))
    return Thing(kind, colour, x, y, radius, angle, bool(rng.integers(2)), int(rng.integers(SEED)))


def _show(rng, width, height, things, leaves, keep) -> tuple[Scene, np.ndarray, list[Seen]]:
    """Draw, leaving out what cannot be seen well enough, the worst first."""
    setting = str(rng.choice(list(SETTINGS)))
    blades = int(rng.integers(1, 4)) if leaves else 0
    scene = Scene(width, height, setting, things, blades, int(rng.integers(SEED)))
    while True:
        picture, seen = render(scene)
        shares = [one.visible / one.whole for one in seen]
        worst = int(np.argmin(shares))
        if shares[worst] >= keep or len(shares) == 1:
            return scene, picture, seen
        scene = replace(scene, things=scene.things[:worst] + scene.things[worst + 1 :])
