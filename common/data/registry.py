"""`--data KIND:PATH,key=value,…`: one way to name a data set, for every task."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from backbench.common.base.errors import UserError
from backbench.common.base.files import user_path

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
FILES = {  # the options that name a file or folder, beside PATH or in it
    "folder": ("boxes",),
    "coco": ("images", "train_images", "val_images", "train", "val"),
    "captions": ("images", "train_images", "val_images", "test_images", "karpathy", "train", "val", "test"),
    "ilsvrc": ("boxes", "train_boxes"),
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

    def absolute(self) -> "DataSpec":
        """The same data named from any folder: PATH, and the files of its options that are there, made absolute."""
        named = FILES.get(self.kind, ())
        if "karpathy" in self.options:  # its parts are names of splits
            named = [key for key in named if key not in ("train", "val", "test")]
        options = {
            key: str(Path(value).absolute()) if key in named and Path(value).exists() else value
            for key, value in self.options.items()
        }
        return replace(self, path=self.path and str(Path(self.path).absolute()), options=options)


def parse_data(text: str) -> DataSpec:
    """Parse `KIND`, `KIND:PATH` or `KIND:PATH,key=value,…` (no path: `captions:images=DIR,…`).

    What is there under a name that holds `,` or `=` is that file or folder. Raises UserError, naming what is known, for
    an unknown kind or option, an option without a value or given twice, and a missing path.
    """
    kind, _, rest = text.strip().partition(":")
    if kind not in OPTIONS:
        known = ", ".join(EXAMPLES.values())
        raise UserError(f"--data {text}: '{kind}' is no kind of data; write KIND:PATH, one of {known}")
    known = OPTIONS[kind]
    pieces = rest.split(",") if rest else []
    if len(pieces) > 1 and _is_there(rest) and not _is_there(pieces[0]):
        pieces = [rest]
    path = None
    # an option's name holds no '/'
    if pieces and ("=" not in pieces[0] or "/" in pieces[0].partition("=")[0] or _is_there(pieces[0])):
        path = _value(pieces, text, known) or None
    options: dict[str, str] = {}
    while pieces:
        piece = pieces[0]
        key, equals, pieces[0] = piece.partition("=")
        if not equals or not pieces[0]:
            _refuse(piece, text)
        if key not in known:
            raise UserError(
                f"--data {text}: '{key}' is no option of {kind}, and nothing is called '{piece}'; known: "
                f"{', '.join(known)}"
            )
        if key in options:
            raise UserError(f"--data {text}: '{key}' is given twice")
        options[key] = _value(pieces, text, known, path)
    if kind not in ("scenes", "captions", "coco") and path is None:
        raise UserError(f"--data {text}: no path; write {EXAMPLES[kind]}")
    if kind == "scenes" and path is not None:
        raise UserError(f"--data {text}: scenes takes no path; write {EXAMPLES[kind]}")
    return DataSpec(kind, path, options)


def _value(pieces: list[str], text: str, known: tuple[str, ...], root: str | None = None) -> str:
    """Take a path or an option's value off the `pieces` between commas: several where a file of that name is there."""
    count = next((i for i, piece in enumerate(pieces) if i and piece.partition("=")[0] in known), len(pieces))
    whole = ",".join(pieces[:count])
    if count > 1 and not (_is_there(whole) or (root and _is_there(f"{root}/{whole}"))):
        if "=" not in pieces[1]:
            _refuse(pieces[1], text)
        count, whole = 1, pieces[0]
    del pieces[:count]
    return str(user_path(whole)) if whole.startswith("~") else whole


def _refuse(piece: str, text: str) -> None:
    raise UserError(f"--data {text}: '{piece}' is not key=value, and nothing has a name that holds it")


def _is_there(text: str) -> bool:
    try:
        return bool(text) and user_path(text).exists()
    except OSError:  # too long for a name
        return False
