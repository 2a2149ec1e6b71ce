"""Progress bars with rate and time left."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """A file to which a bar writes each state as a line: in a log nothing can be written over."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        text = text.replace("\x1b[A", "").strip()  # a second bar goes up a line
        if text not in ("", self.last):
            self.file.write(f"{text}\n")
            self.last = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def progress(
    items: Iterable | None = None, *, desc: str, total: int | None = None, initial: int = 0, **kw: Any
) -> tqdm:
    """A tqdm bar on stderr, silent on ranks other than 0.

    Without a terminal it writes a line every 10 s, or as often as $BACKBENCH_BAR_SECONDS says (the grid reads it).
    """
    if sys.stderr.isatty():
        kw.setdefault("mininterval", 0.2)
    else:
        kw.setdefault("mininterval", float(os.environ.get("BACKBENCH_BAR_SECONDS", "10")))
        kw.setdefault("file", _Lines(sys.stderr))
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    silent = (several and os.environ.get("RANK", "0") != "0") or os.environ.get("BACKBENCH_QUIET") == "1"
    return tqdm(items, desc=desc, total=total, initial=initial, disable=silent, dynamic_ncols=True, **kw)
