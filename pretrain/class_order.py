"""Which output of a classifier is which class of the data: by name, in an order that is stated, or assumed and tested.

A checkpoint of somebody else seldom names its classes, and trainers number them in different orders: `10` stands before
`2` where folder names are sorted as texts, behind it where they are read as numbers.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom

from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, read_json
from backbench.common.data.layout import read_lines

NAMED = ("data", "lexicographic", "numeric")
# what trainers call the names of their classes in a checkpoint or beside it
KEYS = (
    *(
        "classes",
        "CLASSES",
        "class_names",
        "label_names",
        "class_to_idx",
        "idx_to_class",
        "id2label",
        "label2id",
    ),
)
GAIN, RISK, LARGEST = 0.1, 1e-4, 25_000_000  # see `better_order`


@dataclass(frozen=True)
class ClassOrder:
    """`index` int64 (C,): the network's output of each of the data's C `classes`. `outputs`: how many it has.

    `stated`: somebody or something says so; else it is assumed. `key`: what a stage that depends on the order has
    among its inputs, nothing where `index` is what the checkpoint itself gives. `notes`: what to say of it.
    """

    index: np.ndarray
    classes: Sequence[str]
    outputs: int
    stated: bool
    notes: tuple[str, ...] = ()
    key: Mapping[str, str] = field(default_factory=dict)


def class_order_argument(made: argparse.ArgumentParser) -> None:
    """Add `--class-order`."""
    made.add_argument(
        "--class-order",
        metavar="ORDER",
        help="the order of the classifier's outputs: lexicographic (10 before 2, as ImageFolder sorts), numeric (2 "
        "before 10), data (as the data numbers its classes), or a FILE: one class a line, or JSON (a list, "
        "class_to_idx, id2label); default: by the names in the checkpoint, else data, and refused where another order "
        "fits far better",
    )


def match_classes(
    facts: Mapping[str, Any], classes: Sequence[str], spec: str, asked: str | None = None
) -> ClassOrder:
    """The outputs of the data's `classes`: as `asked` (a `--class-order`), else as the checkpoint's names say.

    `facts` are the checkpoint's: num_classes, and its "classes" if it names them ("classes_from": under which key of
    somebody else's file). Raises UserError when the classes are not the same, or `asked` cannot be read.
    """
    own, foreign = {k: v for k, v in facts.items() if k != "classes"}, "classes_from" in facts
    try:  # the order that is in no key
        plain = own_order(own if foreign else facts, classes, spec)
    except UserError:
        if not (asked or foreign):
            raise
        plain = None
    if asked:
        order = asked_order(asked, facts, classes, spec)
    elif foreign:
        order = replace(
            by_name(facts["classes"], facts["num_classes"], classes, spec),
            notes=(f"classes by the checkpoint's own names ({facts['classes_from']})",),
        )
    else:
        return plain
    same = plain is not None and np.array_equal(plain.index, order.index)
    return order if same else replace(order, key={"class_order": digest(order.index.tolist())})


def own_order(facts: Mapping[str, Any], classes: Sequence[str], spec: str) -> ClassOrder:
    """By name where the file tells its classes; by WordNet id where a network of 1,000 classes meets ImageNet's or
    part of them; in order where both have as many."""
    known, count = facts.get("classes"), facts["num_classes"]
    if known is None and count == 1000 and all(map(_wordnet, classes)):
        if len(classes) < count:
            known = _imagenet_classes()
        elif list(classes) == _imagenet_classes(needed=False):
            known = classes
    if known is not None:
        return by_name(known, count, classes, spec)
    if count != len(classes):
        raise UserError(
            f"{spec}: classifies {count} classes, the data has {len(classes)} ({', '.join(classes[:3])} …); "
            "give the data it was trained for, or --class-order FILE with the names of its classes"
        )
    return _in_order(classes, "the checkpoint does not name its classes: taken in the order of the data's")


def by_name(known: Sequence[str], count: int, classes: Sequence[str], spec: str) -> ClassOrder:
    """The outputs of classes that are `known` by name. Raises UserError where they are others, or not `count`."""
    if len(known) != count:
        raise UserError(f"{spec}: names {len(known)} classes and classifies {count}; see --class-order")
    where = {name: i for i, name in enumerate(known)}
    absent = [name for name in classes if name not in where]
    if absent:
        raise UserError(
            f"{spec}: does not know class '{absent[0]}' ({len(absent)} of the data's {len(classes)}); it knows "
            f"{', '.join(known[:4])}{' …' if len(known) > 4 else ''}: give the data it was trained for, or "
            "--class-order FILE with its classes under the data's names"
        )
    return ClassOrder(np.array([where[name] for name in classes], np.int64), classes, count, stated=True)


def asked_order(asked: str, facts: Mapping[str, Any], classes: Sequence[str], spec: str) -> ClassOrder:
    """The order of `--class-order`, with a note where the checkpoint's own names say otherwise."""
    count = facts["num_classes"]
    if asked == "data" and count == len(classes):
        order = _in_order(classes, "")
    else:
        order = by_name(_names_asked(asked, count, classes), count, classes, f"--class-order {asked}")
    notes = [f"class order: {asked if asked in NAMED else Path(asked).name}, as asked for"]
    try:
        says = by_name(facts["classes"], count, classes, spec).index if "classes" in facts else order.index
    except UserError:
        notes.append("its own names are not the data's")
    else:
        if not np.array_equal(says, order.index):
            notes.append("its own names give another order")
    return replace(order, stated=True, notes=("; the checkpoint: ".join(notes),))


def _in_order(classes: Sequence[str], note: str) -> ClassOrder:
    return ClassOrder(np.arange(len(classes)), classes, len(classes), False, (note,) if note else ())


def _names_asked(asked: str, count: int, classes: Sequence[str]) -> list[str]:
    if asked in NAMED:
        if count != len(classes):
            raise UserError(
                f"--class-order {asked}: the classifier has {count} classes, the data {len(classes)}; give a FILE "
                "with the names of all of its classes"
            )
        return named_order(asked, classes)
    file = Path(asked).expanduser()
    if not file.is_file():
        raise UserError(f"--class-order {asked}: no such file, and none of {', '.join(NAMED)}")
    return read_class_names(file, classes)


def named_order(name: str, classes: Sequence[str]) -> list[str]:
    """The classes in an order of NAMED. Raises UserError for numbers where there are none."""
    if name == "numeric":
        if not any(re.search("[0-9]", one) for one in classes):
            raise UserError(f"--class-order numeric: no class has a number in its name ({classes[0]} …)")
        parts = {one: re.split("([0-9]+)", one) for one in classes}
        return sorted(classes, key=lambda c: [int(p) if i % 2 else p for i, p in enumerate(parts[c])])
    return sorted(classes) if name == "lexicographic" else list(classes)


def read_class_names(file: Path, classes: Sequence[str]) -> list[str]:
    """The classes of a text file, one a line, or of JSON: a list, `{name: number}`, `{number: name}`,
    `{number: [id, name]}`, or an object that has one of these under a key of KEYS.

    Raises UserError for anything else, and for a name that is there twice.
    """
    if file.suffix.lower() == ".json":
        content = read_json(file)
        found = [content, *(value for _, value in _named(content))]
        names = next((made for value in found if (made := _names(value, classes))), None)
        if names is None:
            raise UserError(f"{file}: no class names in it; write a list, or an object {{name: number}}")
    else:
        names = [line for line in read_lines(file) if line]
    if not names:
        raise UserError(f"{file}: no class in it; write one a line")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{file}: class '{twice}' is there twice; each output has one class")
    return names


def names_in(content: Any, count: int, spec: str) -> tuple[str, list[str]] | None:
    """(key, names) where a checkpoint's content names its `count` classes, under a key of KEYS.

    Raises UserError when it does so twice, differently.
    """
    found = {key: names for key, value in _named(content) if len(names := _names(value) or ()) == count}
    if len({tuple(names) for names in found.values()}) > 1:
        raise UserError(
            f"{spec}: names its classes differently under {' and '.join(found)}; say which: --class-order FILE"
        )
    return next(iter(found.items()), None)


def _named(content: Any, depth: int = 3, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of whatever stands under a key of KEYS in nested dicts."""
    content = vars(content) if isinstance(content, argparse.Namespace) else content
    if not isinstance(content, Mapping) or not depth:
        return
    for key, value in content.items():
        if key in KEYS:
            yield f"{prefix}{key}", value
        elif isinstance(key, str) and "state_dict" not in key:
            yield from _named(value, depth - 1, f"{prefix}{key}.")


def _names(value: Any, classes: Sequence[str] = ()) -> list[str] | None:
    """The class names, in the order of their numbers, of a value that holds them; None where it does not."""
    if isinstance(value, Mapping) and value:
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value.values()):
            value = {v: k for k, v in value.items()} if len(set(value.values())) == len(value) else {}
        numbered = {int(k): v for k, v in value.items() if str(k).isdecimal()}
        value = [numbered[i] for i in range(len(numbered)) if i in numbered]
        if len(value) < len(numbered) or not numbered:
            return None
        if all(isinstance(v, list | tuple) and len(v) == 2 for v in value):  # ImageNet's: WordNet id and word
            ids, words = (list(column) for column in zip(*value))
            value = words if set(classes) <= set(words) and classes else ids
    if not isinstance(value, list | tuple) or not value:
        return None
    fits = all(isinstance(v, str | int) and not isinstance(v, bool) for v in value)
    return [str(v) for v in value] if fits else None


def check_order(order: ClassOrder, predicted: np.ndarray, labels: np.ndarray, spec: str) -> tuple[str, ...]:
    """What to note of an order after the classifier's answers: `predicted` int (n,), outputs; `labels` int (n,).

    Raises UserError when the order is only assumed and another fits far better, and says which; where it is stated
    (by names, by `--class-order`) that is a note.
    """
    best = better_order(order, predicted, labels)
    if best is None:
        return order.notes
    share = f"{100 * (order.index[labels] == predicted).mean():.1f} %"
    fits = (best[labels] == predicted).mean()
    text = f"in the assumed order of classes {share} of {len(labels)} images are right, in another {100 * fits:.1f} %"
    advice = _advice(order, best, predicted, labels)
    if order.stated:
        return (*order.notes, f"{text.replace('assumed', 'stated')}: are the classes numbered so? {advice}")
    raise UserError(f"{spec}: {text}: {advice}; or --class-order data keeps the data's order")


def better_order(order: ClassOrder, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """The outputs (C,) that fit the answers best, where they fit far better than the order's own; else None.

    An order found on one half of each class's images is scored on the other half, so that none is found in noise: it
    must be right on GAIN of all images more than the order's own, and the images on which just one of the two is right
    must favour it (one-sided sign test at RISK). Above LARGEST pairs of class and output nothing is sought.
    """
    if len(order.classes) * order.outputs > LARGEST or not len(labels):
        return None
    ranked = np.argsort(labels, kind="stable")
    first = np.r_[0, np.flatnonzero(np.diff(labels[ranked])) + 1]
    place = np.arange(len(labels)) - np.repeat(first, np.diff(np.r_[first, len(labels)]))
    half = np.empty(len(labels), bool)
    half[ranked] = place % 2 == 0
    ours = order.index[labels] == predicted
    theirs = np.zeros(len(labels), bool)
    for part in (half, ~half):
        found = _assign(order, predicted[part], labels[part])
        theirs[~part] = found[labels[~part]] == predicted[~part]
    gained, lost = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    if gained - lost < GAIN * len(labels) or binom.sf(gained - 1, gained + lost, 0.5) > RISK:
        return None
    return _assign(order, predicted, labels)


def _assign(order: ClassOrder, predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The outputs (C,) with the most right answers; of equals those of the order itself."""
    shape = (len(order.classes), order.outputs)
    hits = np.bincount(labels * order.outputs + predicted, minlength=shape[0] * shape[1]).reshape(shape)
    hits = hits * (shape[0] + 1.0)
    hits[np.arange(shape[0]), order.index] += 1
    return linear_sum_assignment(hits, maximize=True)[1]


def _advice(order: ClassOrder, best: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> str:
    """What to pass: a named order that is right on nearly as many images, else a list of names."""
    count, classes = order.outputs, list(order.classes)
    ours, theirs = (int((index[labels] == predicted).sum()) for index in (order.index, best))
    for name in NAMED if count == len(classes) else ():
        try:
            names = named_order(name, classes)
        except UserError:
            continue
        index = np.array([names.index(one) for one in classes])
        right = int((index[labels] == predicted).sum())
        if right - ours > 0.8 * (theirs - ours):
            return f"--class-order {name} gives {100 * right / len(labels):.1f} %"
    which = {int(k): name for name, k in zip(classes, best)}
    some = ", ".join(f"{k} {json.dumps(which[k], ensure_ascii=False)}" for k in sorted(which)[:3])
    return f"no named order does; its outputs look like {some} …: write their names, one a line: --class-order FILE"


def _wordnet(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()


def _imagenet_classes(needed: bool = True) -> list[str] | None:
    """ImageNet's 1,000 WordNet ids in their order; without timm None, or UserError where they are `needed`."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        if not needed:
            return None
        raise UserError(
            "part of ImageNet's classes and a network of all 1,000: which is which is known to timm; "
            "pip install 'backbench[interop]'"
        ) from None
    return ImageNetInfo().label_names()
