"""The ten kinds of object: a textured body and one small part.

Shapes are signed distances (negative inside) in the object's own frame, u to the right and v down, where
everything lies within about 1.1 of the origin. Each outline and each texture is shared by two kinds: the small
part tells a kind at once, the body only by its outline and texture together, and covers most of the object, so
finding the telling part is not finding the object.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np

Array = np.ndarray
Distance = Callable[[Array, Array], Array]

REACH = 1.25  # no object reaches further from its centre, in radii (the widest: a stretched fish's tail)


def ellipse(u: Array, v: Array, cu: float, cv: float, a: float, b: float) -> Array:
    """Distance to an axis-parallel ellipse, first-order accurate near its edge."""
    u, v = (u - cu) / a, (v - cv) / b
    k = np.sqrt(u * u + v * v)
    return k * (k - 1) / (np.sqrt((u / a) ** 2 + (v / b) ** 2) + 1e-6)


def disc(u: Array, v: Array, cu: float, cv: float, r: float) -> Array:
    """Distance to a disc."""
    return np.sqrt((u - cu) ** 2 + (v - cv) ** 2) - r


def ring(u: Array, v: Array, cu: float, cv: float, r: float, w: float) -> Array:
    """Distance to a circle's line of half-width `w`."""
    return np.abs(disc(u, v, cu, cv, r)) - w


def bar(u: Array, v: Array, u0: float, v0: float, u1: float, v1: float, w: float) -> Array:
    """Distance to a straight line with round ends and half-width `w`."""
    du, dv = u1 - u0, v1 - v0
    t = np.clip(((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv), 0, 1)
    return np.sqrt((u - u0 - t * du) ** 2 + (v - v0 - t * dv) ** 2) - w


def box(u: Array, v: Array, cu: float, cv: float, hu: float, hv: float, r: float = 0.03) -> Array:
    """Distance to an upright rectangle of half-sides `hu`, `hv` with corners rounded by `r`."""
    qu, qv = np.abs(u - cu) - (hu - r), np.abs(v - cv) - (hv - r)
    outside = np.sqrt(np.maximum(qu, 0) ** 2 + np.maximum(qv, 0) ** 2)
    return outside + np.minimum(np.maximum(qu, qv), 0) - r


def convex(u: Array, v: Array, *corners: tuple[float, float]) -> Array:
    """Distance (inside and beside the edges) to a convex polygon, corners clockwise as seen with v down."""
    distance = None
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        du, dv = u1 - u0, v1 - v0
        side = ((u - u0) * dv - (v - v0) * du) / (du * du + dv * dv) ** 0.5
        distance = side if distance is None else np.maximum(distance, side)
    return distance


def union(*distances: Array) -> Array:
    """The nearest of several shapes."""
    return reduce(np.minimum, distances)


def _oval(u, v):
    return ellipse(u, v, -0.14, 0.14, 0.74, 0.58)


def _barrel(u, v):
    return box(u, v, 0, 0.24, 0.46, 0.64, 0.18)


def _finned(u, v):
    tail = convex(u, v, (-0.4, 0.05), (-0.98, 0.45), (-0.98, -0.35))
    return union(ellipse(u, v, 0.1, 0.05, 0.66, 0.45), tail)


def _dome(u, v):
    return np.maximum(ellipse(u, v, -0.14, 0.42, 0.76, 0.92), v - 0.45)


def _flared(u, v):
    half = 0.24 + 0.5 * np.clip((v + 0.62) / 1.17, 0, 1) ** 1.6
    return np.maximum((np.abs(u) - half) * 0.9, np.abs(v + 0.035) - 0.585)


def _spots(u, v):
    row = np.floor(v)
    a, b = u + 0.5 * row, v - row - 0.5
    a = a - np.floor(a) - 0.5
    return 0.3 - np.sqrt(a * a + b * b)


def _bands(u, v):
    return 0.25 - np.abs(v - np.floor(v) - 0.5)


def _scales(u, v):
    row = np.floor(u)
    a, b = u - row, v + 0.5 * row
    b = b - np.floor(b) - 0.5
    return 0.2 - np.abs(np.sqrt(a * a + b * b) - 0.72)


def _plates(u, v):
    row = np.floor(v)
    a = u + 0.5 * row
    return np.maximum(np.abs(a - np.floor(a) - 0.5), np.abs(v - row - 0.5)) - 0.38


def _zigzag(u, v):
    w = v + np.abs(u - np.floor(u) - 0.5)
    return 0.25 - np.abs(w - np.floor(w) - 0.5)


def _beetle(u, v):
    feelers = [bar(u, v, 0.66, -0.05, 0.52, -0.52, 0.035), bar(u, v, 0.72, -0.05, 0.9, -0.5, 0.035)]
    return union(
        disc(u, v, 0.68, 0, 0.21), *feelers, disc(u, v, 0.52, -0.54, 0.08), disc(u, v, 0.9, -0.52, 0.08)
    )


def _kettle(u, v):
    handle = np.maximum(ring(u, v, -0.14, -0.3, 0.36, 0.055), v + 0.3)
    return union(handle, bar(u, v, 0.42, 0.12, 0.86, -0.34, 0.1), bar(u, v, 0.82, -0.36, 0.96, -0.28, 0.07))


def _lantern(u, v):
    cap = convex(u, v, (0.42, -0.3), (-0.42, -0.3), (-0.16, -0.6), (0.16, -0.6))
    return union(cap, ring(u, v, 0, -0.77, 0.16, 0.05), box(u, v, 0, 0.86, 0.4, 0.07))


def _bottle(u, v):
    return union(
        box(u, v, 0, -0.5, 0.14, 0.22), box(u, v, 0, -0.72, 0.2, 0.06), box(u, v, 0, -0.86, 0.11, 0.11)
    )


def _fish(u, v):
    fin = convex(u, v, (-0.2, -0.34), (-0.24, -0.78), (0.1, -0.66), (0.42, -0.28))
    return union(fin, convex(u, v, (0.0, 0.45), (0.3, 0.42), (0.02, 0.74)))


def _bird(u, v):
    beak = convex(u, v, (0.72, -0.16), (0.74, -0.46), (1.02, -0.2))
    return union(disc(u, v, 0.6, -0.34, 0.24), beak)


def _turtle(u, v):
    feet = [ellipse(u, v, at, 0.5, 0.15, 0.11) for at in (-0.6, 0.3)]
    return union(ellipse(u, v, 0.76, 0.26, 0.22, 0.17), *feet)


def _snail(u, v):
    stalks = [bar(u, v, 0.78, 0.1, 0.66, -0.28, 0.04), bar(u, v, 0.82, 0.1, 0.96, -0.24, 0.04)]
    tips = [disc(u, v, 0.66, -0.3, 0.08), disc(u, v, 0.96, -0.26, 0.08)]
    return union(
        bar(u, v, -0.8, 0.48, 0.66, 0.48, 0.08), bar(u, v, 0.66, 0.46, 0.8, 0.12, 0.1), *stalks, *tips
    )


def _bell(u, v):
    return union(disc(u, v, 0, 0.64, 0.17), ring(u, v, 0, -0.74, 0.13, 0.05))


def _tent(u, v):
    flag = convex(u, v, (0.0, -0.98), (0.38, -0.84), (0.0, -0.7))
    return union(bar(u, v, 0, -0.5, 0, -0.98, 0.04), flag)


# kind: outline, texture (positive where the second shade is, in cells), cells in a unit, small part, eye (u, v)
KINDS: dict[str, tuple[Distance, Distance, float, Distance, tuple[float, float] | None]] = {
    "beetle": (_oval, _spots, 2.9, _beetle, (0.74, -0.04)),
    "bell": (_flared, _spots, 2.9, _bell, None),
    "bird": (_finned, _bands, 2.8, _bird, (0.66, -0.38)),
    "bottle": (_barrel, _bands, 2.6, _bottle, None),
    "fish": (_finned, _scales, 3.4, _fish, (0.52, -0.08)),
    "kettle": (_oval, _zigzag, 2.2, _kettle, None),
    "lantern": (_barrel, _plates, 2.7, _lantern, None),
    "snail": (_dome, _scales, 3.0, _snail, None),
    "tent": (_flared, _zigzag, 2.2, _tent, None),
    "turtle": (_dome, _plates, 2.7, _turtle, (0.82, 0.22)),
}
CLASSES = tuple(KINDS)
