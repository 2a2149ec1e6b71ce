"""Progress bars with rate and time left."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    items: Iterable | None = None, *, desc: str, total: int | None = None, initial: int = 0, **kw: Any
) -> tqdm:
    """A tqdm bar on stderr, silent on ranks other than 0.

    Without a terminal it is written every 10 s, or as often as $BACKBENCH_BAR_SECONDS says (the grid reads it).
    """
    seconds = float(os.environ.get("BACKBENCH_BAR_SECONDS", "10"))
    kw.setdefault("mininterval", 0.2 if sys.stderr.isatty() else seconds)
    silent = int(os.environ.get("RANK", "0")) != 0 or os.environ.get("BACKBENCH_QUIET") == "1"
    return tqdm(items, desc=desc, total=total, initial=initial, disable=silent, dynamic_ncols=True, **kw)
