"""Drawing a scene with numpy and cv2, and the exact box of what is visible of each object."""

from dataclasses import dataclass, field

import cv2
import numpy as np

from backbench.common.data.scenes.shapes import KINDS, REACH, disc

# RGB. A named colour is jittered a little for every object, and has nothing to do with the object's kind.
COLOURS = {
    "red": (205, 45, 45),
    "orange": (235, 135, 35),
    "yellow": (240, 210, 60),
    "green": (70, 165, 75),
    "blue": (55, 100, 205),
    "purple": (130, 70, 175),
    "pink": (240, 140, 180),
    "white": (238, 236, 230),
}
PART_COLOURS = ((244, 230, 200), (70, 62, 66), (176, 136, 96), (150, 160, 172))

# calm ground colours (top, bottom) of each setting
SETTINGS = {
    "meadow": ((176, 200, 150), (126, 162, 104)),
    "sand": ((228, 210, 172), (204, 180, 136)),
    "snow": ((214, 224, 234), (238, 242, 246)),
    "water": ((136, 186, 200), (84, 140, 166)),
    "night": ((44, 46, 74), (74, 72, 100)),
    "floor": ((186, 150, 118), (160, 122, 92)),
}


@dataclass(frozen=True)
class Thing:
    """One object: `kind` of shapes.KINDS, a named colour, centre and radius in pixels, angle in radians."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    flip: bool = False
    seed: int = 0  # small variations of shape, texture and colour


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. Later things are nearer and hide earlier ones; blades hide all."""

    width: int
    height: int
    setting: str
    things: tuple[Thing, ...]
    blades: int = 0
    seed: int = 0  # background, blades and noise


@dataclass
class Seen:
    """What the drawing shows of one thing, in pixels that it covers at least half.

    `box` is (x0, y0, x1, y1), x1 and y1 exclusive, of the visible pixels; None when nothing is visible.
    `whole` counts the thing's pixels, cut by the border or not, `inside` those within the picture, `visible`
    those not hidden either; `hides[j]` the pixels of earlier thing j that this one covers.
    """

    whole: int
    inside: int
    visible: int = 0
    box: tuple[int, int, int, int] | None = None
    hides: dict[int, int] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        """Cut by the picture's border."""
        return self.inside < self.whole


def paint(thing: Thing) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Draw one object alone, on the smallest rectangle that holds it.

    Returns float32 RGB planes (3, h, w) and coverage (h, w) in [0, 1], and the rectangle's left and top.
    """
    outline, texture, cells, part, eye = KINDS[thing.kind]
    rng = np.random.default_rng(thing.seed)
    r = thing.radius
    left, top = int(np.floor(thing.x - REACH * r)), int(np.floor(thing.y - REACH * r))
    right, bottom = int(np.ceil(thing.x + REACH * r)), int(np.ceil(thing.y + REACH * r))
    xs = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - thing.x)) / np.float32(r)
    ys = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - thing.y))[:, None] / np.float32(r)
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    stretch = rng.uniform(0.9, 1.1, 2).astype(np.float32)
    u = (cos * xs + sin * ys) * ((-1 if thing.flip else 1) / stretch[0])
    v = (cos * ys - sin * xs) / stretch[1]

    base = np.float32(COLOURS[thing.colour]) + rng.uniform(-14, 14, 3).astype(np.float32)
    dark = rng.random() < 0.6 or base.mean() > 170  # a paler shade of a pale colour would not show
    second = base * 0.52 if dark else base * 0.45 + np.float32((140, 138, 130))
    accent = np.float32(PART_COLOURS[rng.integers(len(PART_COLOURS))]) + rng.uniform(-10, 10, 3).astype(
        np.float32
    )
    scale, phase = np.float32(cells * rng.uniform(0.85, 1.2)), rng.uniform(0, 1, 2).astype(np.float32)

    body, piece = outline(u, v), part(u, v)
    edge = np.float32(r)  # distances in radii to coverage in pixels
    touched = np.minimum(body, piece) * edge < 0.5
    columns, rows = (_extent(touched.any(axis)) for axis in (0, 1))
    body, piece, u, v = (plane[rows, columns] for plane in (body, piece, u, v))
    xs, ys, left, top = xs[columns], ys[rows], left + columns.start, top + rows.start

    # the picture is a sum of four colours, each with its share of light in every pixel
    pattern = _unit(0.5 + texture(u * scale + phase[0], v * scale + phase[1]) * (edge / scale))
    rim = max(0.045, 1.1 / r)  # darker along the outline
    light = np.float32(1.04) - np.float32(0.16) * xs - np.float32(0.16) * ys  # from the picture's upper left
    on_piece = _unit(0.5 - piece * edge)
    of_body = light * (1 - 0.5 * _unit((body + rim) * edge)) * (1 - on_piece)
    of_piece = light * (1 - 0.55 * _unit((piece + rim) * edge)) * on_piece
    shares = [of_body * (1 - pattern), of_body * pattern, of_piece]
    if eye:
        centre = disc(u, v, *eye, 0.05)
        white, pupil = _unit(0.5 + (0.035 - centre) * edge), _unit(0.5 - centre * edge)
        shares = [share * (1 - white) for share in shares] + [white * (1 - 0.9 * pupil)]
    colours = (base, second, accent, np.full(3, 250, np.float32))
    rgb = np.stack([sum(colour[c] * share for colour, share in zip(colours, shares)) for c in range(3)])
    return rgb, np.maximum(_unit(0.5 - body * edge), on_piece), left, top


def _unit(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, 0), 1)  # np.clip takes twice as long on small arrays


def _extent(any_set: np.ndarray) -> slice:
    """From the first to the last true value of a boolean vector that has one."""
    at = np.flatnonzero(any_set)
    return slice(int(at[0]), int(at[-1]) + 1)


def render(scene: Scene) -> tuple[np.ndarray, list[Seen]]:
    """Draw a scene. Returns the RGB picture, uint8 (height, width, 3), and what it shows of each thing."""
    rng = np.random.default_rng(scene.seed)
    canvas = np.moveaxis(_ground(scene, rng), -1, 0).astype(np.float32, order="C")
    owner = np.full((scene.height, scene.width), -1, np.int8)
    seen: list[Seen] = []
    windows = []
    for number, thing in enumerate(scene.things):
        rgb, cover, left, top = paint(thing)
        x0, x1 = (min(max(x, 0), scene.width) for x in (left, left + cover.shape[1]))
        y0, y1 = (min(max(y, 0), scene.height) for y in (top, top + cover.shape[0]))
        window = (slice(y0, y1), slice(x0, x1))
        cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        alpha, below = cover[cut], owner[window]
        under = canvas[:, *window]
        under += (rgb[:, *cut] - under) * alpha
        mine = alpha >= 0.5
        hidden = np.bincount(below[mine] + 1, minlength=1)[1:]
        below[mine] = number
        hides = {j: int(n) for j, n in enumerate(hidden) if n}
        seen.append(Seen(int(np.count_nonzero(cover >= 0.5)), int(np.count_nonzero(mine)), hides=hides))
        windows.append(window)
    _blades(scene, canvas, owner, rng)
    for number, (window, one) in enumerate(zip(windows, seen, strict=True)):
        shown = owner[window] == number
        one.visible = int(np.count_nonzero(shown))
        if one.visible:
            (y, x), (ys, xs) = (w.start for w in window), (_extent(shown.any(axis)) for axis in (1, 0))
            one.box = (x + xs.start, y + ys.start, x + xs.stop, y + ys.stop)
    grain = np.frombuffer(rng.bytes(owner.size), np.uint8).reshape(owner.shape)
    canvas += grain * np.float32(14 / 255) - 7
    np.clip(canvas, 0, 255, out=canvas)
    return cv2.merge(list(canvas.astype(np.uint8))), seen


def _ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A calm ground with soft patches, the setting's marks and a few muted stones. uint8 (h, w, 3)."""
    size = np.array([scene.width, scene.height])
    unit = size.min() / 100  # marks grow with the picture
    thick = max(1, round(0.9 * unit))
    first, last = (
        np.float32(c) + rng.uniform(-12, 12, 3).astype(np.float32) for c in SETTINGS[scene.setting]
    )
    tone = (first + last) / 2
    grid = first + (last - first) * np.linspace(0, 1, 6, dtype=np.float32)[:, None, None]
    grid = grid + rng.uniform(-11, 11, (6, 6, 1)) + rng.uniform(-6, 6, (6, 6, 3))
    # soft patches: round between the grid's points first, as cv2's cubic resize is slow
    at = np.abs(np.linspace(0, 5, 24)[:, None] - np.arange(6))
    weights = np.cos(np.pi / 2 * np.minimum(at, 1)) ** 2
    planes = np.clip(weights @ np.moveaxis(grid, -1, 0) @ weights.T, 0, 255).astype(np.uint8)
    ground = cv2.resize(cv2.merge(list(planes)), tuple(size.tolist()))

    def dots(count: int, radius: tuple[float, float], shift: tuple[float, float]) -> None:
        spots, radii = (
            (rng.random((count, 2)) * size).astype(int).tolist(),
            rng.uniform(*radius, count) * unit,
        )
        shades = (tone + rng.uniform(*shift, (count, 1))).tolist()
        for spot, r, shade in zip(spots, radii.tolist(), shades, strict=True):
            cv2.circle(ground, spot, max(1, round(r)), shade, -1, cv2.LINE_AA)

    def lines(starts: np.ndarray, ends: np.ndarray, shift: tuple[float, float]) -> None:
        shades = (tone + rng.uniform(*shift, (len(starts), 1))).tolist()
        for start, end, shade in zip(
            starts.round().astype(int), ends.round().astype(int), shades, strict=True
        ):
            cv2.line(ground, tuple(start.tolist()), tuple(end.tolist()), shade, thick, cv2.LINE_AA)

    match scene.setting:
        case "meadow":
            feet = rng.random((45, 2)) * size
            lean = np.stack([rng.normal(0, 2, 45), -rng.uniform(4, 9, 45)], 1) * unit
            lines(feet, feet + lean, (-30, 22))
        case "sand":
            dots(70, (0.6, 1.0), (-34, 24))
        case "snow":
            dots(26, (1, 2.6), (-16, 20))
        case "night":
            dots(30, (0.3, 1.1), (30, 90))
        case "water":
            x = np.arange(0, scene.width + 4, 4)
            for y in np.arange(rng.uniform(0, 12), 100, 12) * (scene.height / 100):
                wave = y + 1.6 * unit * np.sin(x / (5 * unit) + rng.uniform(0, 6))
                line = np.stack([x, wave], 1).round().astype(np.int32)
                cv2.polylines(
                    ground, [line], False, (tone + rng.uniform(-22, 22)).tolist(), thick, cv2.LINE_AA
                )
        case "floor":
            y = np.arange(rng.uniform(0, 16), 100, 16) * (scene.height / 100)
            x, right = rng.random(len(y)) * scene.width, np.full(len(y), scene.width)
            lines(np.stack([0 * y, y], 1), np.stack([right, y], 1), (-36, -30))
            lines(np.stack([x, y], 1), np.stack([x, y + 0.16 * scene.height], 1), (-32, -24))
    count = int(rng.integers(2, 7))  # clutter
    spots, axes = rng.random((count, 2)) * size, np.maximum(rng.uniform(2, 9, (count, 2)) * unit, 1)
    turns = rng.uniform(0, 180, count)
    shades = tone + rng.uniform(-34, 30, (count, 1)) + rng.uniform(-16, 16, (count, 3))
    for spot, axis, turn, shade in zip(
        spots.astype(int), axes.round().astype(int), turns, shades, strict=True
    ):
        cv2.ellipse(ground, spot.tolist(), axis.tolist(), turn, 0, 360, shade.tolist(), -1, cv2.LINE_AA)
    return ground


def _blades(scene: Scene, canvas: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> None:
    """Grow `scene.blades` thin leaves from the lower border in front of everything, in place."""
    side = min(scene.height, scene.width)
    for _ in range(scene.blades):
        foot, bend = rng.uniform(0, scene.width), rng.normal(0, 0.16) * side
        half, tall = rng.uniform(0.015, 0.035) * side, rng.uniform(0.35, 0.85) * side
        t = np.linspace(0, 1, 9)
        middle, wide = foot + bend * t**2, half * (1 - t) ** 0.7
        y = scene.height - tall * t
        outline = np.concatenate([np.stack([middle - wide, y], 1), np.stack([middle + wide, y], 1)[::-1]])
        cover = np.zeros((scene.height, scene.width), np.uint8)
        cv2.fillPoly(cover, [(outline * 16).round().astype(np.int32)], 255, cv2.LINE_AA, 4)
        colour = np.float32((92, 116, 70)) + rng.uniform(-22, 22, 3).astype(np.float32)
        canvas += (colour[:, None, None] - canvas) * (cover * np.float32(1 / 255))
        owner[cover >= 128] = -1
