"""`--data KIND:PATH,key=value,…`: one way to name a data set, for every task."""

from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError

OPTIONS = {
    "scenes": ("size", "seed", "name"),
    "folder": ("train", "val", "boxes", "boxes_split", "exclude_boxed", "name"),
    "voc": ("year", "train", "test", "classes", "rescale", "name"),
    "coco": ("year", "images", "train_images", "val_images", "train", "val", "classes", "rescale", "name"),
    "captions": (
        *("images", "train_images", "val_images", "test_images", "train", "val", "test"),
        *("year", "karpathy", "name"),
    ),
    "cub": ("name",),
    "ilsvrc": ("boxes", "train_boxes", "name"),
    "tiny_imagenet": ("name",),
    "cifar10": ("name",),
    "cifar100": ("name",),
}
EXAMPLES = {
    "scenes": "scenes:size=smoke",
    "folder": "folder:DIR,boxes=FILE",
    "voc": "voc:VOCDEVKIT,year=2007+2012",
    "coco": "coco:images=DIR,train=A.json,val=B.json",
    "captions": "captions:images=DIR,train=A.json,val=B.json",
    "cub": "cub:CUB_200_2011",
    "ilsvrc": "ilsvrc:DIR,boxes=FILE_OR_DIR",
    "tiny_imagenet": "tiny_imagenet:tiny-imagenet-200",
    "cifar10": "cifar10:DIR",
    "cifar100": "cifar100:DIR",
}


@dataclass(frozen=True)
class DataSpec:
    """A parsed `--data`: what reader, where, and its options (all strings, as written; `~` expanded)."""

    kind: str
    path: str | None = None
    options: dict[str, str] = field(default_factory=dict)

    def switch(self, key: str) -> bool:
        """An option that is 1 (on) or 0 (off, as without it). UserError for another value."""
        value = self.options.get(key, "0")
        if value not in ("0", "1"):
            raise UserError(f"--data {self}: {key}={value}; it is 1 or 0")
        return value == "1"

    def __str__(self) -> str:
        parts = ([self.path] if self.path else []) + [f"{key}={value}" for key, value in self.options.items()]
        return f"{self.kind}:{','.join(parts)}" if parts else self.kind


def parse_data(text: str) -> DataSpec:
    """Parse `KIND`, `KIND:PATH` or `KIND:PATH,key=value,…` (no path: `captions:images=DIR,…`).

    Raises UserError, naming what is known, for an unknown kind or option, an option without a value or given
    twice, and a missing path.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in OPTIONS:
        known = ", ".join(EXAMPLES.values())
        raise UserError(f"--data {text}: '{kind}' is no kind of data; write KIND:PATH, one of {known}")
    known = OPTIONS[kind]
    pieces = rest.split(",") if rest else []
    path = None
    # a folder may hold a '=' in its name, an option's name holds no '/'
    if pieces and ("=" not in pieces[0] or "/" in pieces[0].partition("=")[0]):
        path = _home(pieces.pop(0)) or None
    options: dict[str, str] = {}
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals or not value:
            raise UserError(f"--data {text}: '{piece}' is not key=value (a path cannot hold a comma)")
        if key not in known:
            raise UserError(f"--data {text}: '{key}' is no option of {kind}; known: {', '.join(known)}")
        if key in options:
            raise UserError(f"--data {text}: '{key}' is given twice")
        options[key] = _home(value)
    if kind not in ("scenes", "captions", "coco") and path is None:
        raise UserError(f"--data {text}: no path; write {EXAMPLES[kind]}")
    if kind == "scenes" and path is not None:
        raise UserError(f"--data {text}: scenes takes no path; write {EXAMPLES[kind]}")
    return DataSpec(kind, path, options)


def _home(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~") else text
