"""Five different true sentences about a drawn scene, from a vocabulary of about 70 words."""

from collections.abc import Sequence

import numpy as np

from backbench.common.data.scenes.compose import BIG, SMALL
from backbench.common.data.scenes.draw import Scene, Seen, Thing

PLACES = {
    "meadow": "in a meadow",
    "sand": "on the sand",
    "snow": "in the snow",
    "water": "under water",
    "night": "at night",
    "floor": "on a wooden floor",
}
NUMBERS = ("no", "one", "two", "three", "four")


def describe(scene: Scene, seen: Sequence[Seen], rng: np.random.Generator) -> list[str]:
    """Five different sentences, each true of what the drawing shows (`seen` as `render` gives it)."""
    if len(scene.things) == 1:
        sentences = _alone(scene, rng)
    else:
        sentences = list(dict.fromkeys(_together(scene, seen, rng)))
    first, rest = sentences[:1], sentences[1:]  # the fullest sentence is always among the five
    chosen = first + [rest[i] for i in rng.permutation(len(rest))[:4]]
    return [chosen[i] for i in rng.permutation(5)]


def relations(scene: Scene, seen: Sequence[Seen]) -> list[tuple[int, str, int]]:
    """All clear (a, relation, b) between things a and b by number.

    Left, right, above and below need centres further apart than a quarter of the picture's shorter side and
    1.5 times further than in the other direction; behind and in front need 4 % of the hinder thing covered.
    """
    found = []
    far = min(scene.width, scene.height) / 4
    for b, near in enumerate(scene.things):
        for a, thing in enumerate(scene.things[:b]):
            dx, dy = near.x - thing.x, near.y - thing.y
            if abs(dx) > max(far, 1.5 * abs(dy)):
                pair = ("to the left of", "to the right of")
            elif abs(dy) > max(far, 1.5 * abs(dx)):
                pair = ("above", "below")
            else:
                pair = ()
            if pair:
                one, other = pair if max(dx, dy, key=abs) > 0 else pair[::-1]
                found += [(a, one, b), (b, other, a)]
            if seen[b].hides.get(a, 0) > 0.04 * seen[a].inside:
                found += [(a, "behind", b), (b, "in front of", a)]
    return found


def size_of(scene: Scene, thing: Thing) -> str | None:
    """'small', 'big', or None for a thing between."""
    share = thing.radius / min(scene.width, scene.height)
    return "small" if share < SMALL else "big" if share > BIG else None


def _alone(scene: Scene, rng: np.random.Generator) -> list[str]:
    thing, place, size = scene.things[0], PLACES[scene.setting], size_of(scene, scene.things[0])
    qualities = f"{size} and {thing.colour}" if size else thing.colour
    return [
        f"{_np(scene, thing, rng)} {place}",
        f"there is one {thing.colour} {thing.kind} {place}",
        f"a picture of {_np(scene, thing, rng)}",
        f"the {thing.kind} is {qualities}",
        f"{_article(thing.colour)} {thing.kind} and nothing else {place}",
        f"only one thing can be seen and it is {_article(thing.kind)}",
    ]


def _together(scene: Scene, seen: Sequence[Seen], rng: np.random.Generator) -> list[str]:
    things, place = scene.things, PLACES[scene.setting]
    number = NUMBERS[len(things)]
    plain = _groups(things, colours=False)
    sentences = [
        f"{_groups(things, colours=True)} {place}",
        f"there are {number} things {place}",
        f"a picture of {plain}",
        f"there {'are' if plain.startswith(NUMBERS[2:]) else 'is'} {plain} {place}",
    ]
    main = int(np.argmax([thing.radius for thing in things]))
    others = _groups([t for i, t in enumerate(things) if i != main], colours=False)
    sentences.append(f"{_np(scene, things[main], rng)} with {others}")
    found = relations(scene, seen)
    for i in rng.permutation(len(found))[:3]:
        a, relation, b = found[i]
        sentences.append(f"{_np(scene, things[a], rng)} is {relation} {_np(scene, things[b], rng)}")
    colour = things[int(rng.integers(len(things)))].colour
    same = sum(t.colour == colour for t in things)
    if same == len(things):
        sentences.append(f"all {number} things are {colour}")
    elif same > 1:
        sentences.append(f"{number} things and {NUMBERS[same]} of them are {colour}")
    return sentences


def _np(scene: Scene, thing: Thing, rng: np.random.Generator) -> str:
    """'a big red beetle': the size where it has one, in one of two words."""
    size = size_of(scene, thing)
    word = (
        {"small": ("small", "little"), "big": ("big", "large")}[size][int(rng.random() < 0.3)] if size else ""
    )
    return _article(f"{word} {thing.colour} {thing.kind}".strip())


def _groups(things: Sequence[Thing], *, colours: bool) -> str:
    """'two red fish, a bell and a blue kettle': from left to right, equal kinds (and colours) together."""
    groups: dict[tuple[str, str], list[Thing]] = {}
    for thing in sorted(things, key=lambda thing: thing.x):
        groups.setdefault((thing.kind, thing.colour if colours else ""), []).append(thing)
    phrases = []
    for (kind, colour), members in groups.items():
        noun = f"{colour} {kind}".strip()
        many = len(members) > 1
        phrases.append(
            f"{NUMBERS[len(members)]} {noun if kind == 'fish' else noun + 's'}" if many else _article(noun)
        )
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
