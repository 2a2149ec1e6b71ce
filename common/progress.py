"""Progress bars with rate and time left."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable | None = None, *, desc: str, total: int | None = None, initial: int = 0, **kw: Any
) -> tqdm:
    """A tqdm bar on stderr. Silent on ranks other than 0; a line every 10 s when stderr is not a terminal."""
    kw.setdefault("mininterval", 0.2 if sys.stderr.isatty() else 10.0)
    silent = int(os.environ.get("RANK", "0")) != 0 or os.environ.get("BACKBENCH_QUIET") == "1"
    return tqdm(items, desc=desc, total=total, initial=initial, disable=silent, dynamic_ncols=True, **kw)
