"""What a terminal shows while cells run: one overall bar with the time left, and each running cell's own progress."""

import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from backbench.common.base.progress import progress


class Display:
    """An overall bar "cell 7 of 24", a line a running cell; without a terminal, a line at each start and end."""

    def __init__(self, cells: int, slots: int) -> None:
        self.cells, self.live, self.shown_at = cells, sys.stderr.isatty(), 0.0
        form = "{desc} |{bar:30}| {elapsed} gone{postfix}"
        self.bar = progress(desc="cells", total=cells, bar_format=form) if self.live else None
        self.slots = (
            [tqdm(bar_format="  {desc}", position=n + 1, leave=False) for n in range(slots)]
            if self.live
            else []
        )

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: Any) -> None:
        for bar in [*self.slots, self.bar] if self.bar is not None else []:
            bar.close()

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def show(self, outcomes: list, running: list[tuple[str, Path]], jobs: list) -> None:
        """Refresh the bars, at most twice a second."""
        if self.bar is None or time.monotonic() - self.shown_at < 0.5:
            return
        self.shown_at = time.monotonic()
        left = _seconds_left(outcomes, jobs, max(1, len(running)))
        self.bar.n = len(outcomes)
        self.bar.set_description_str(
            f"cell {min(len(outcomes) + 1, self.cells)} of {self.cells}", refresh=False
        )
        self.bar.set_postfix_str(
            f"about {int(left) // 60}:{int(left) % 60:02d} left" if left else "", refresh=self.live
        )
        for number, bar in enumerate(self.slots):
            name, log = running[number] if number < len(running) else ("", None)
            bar.set_description_str(f"{name}: {last_lines(log, 1)[:100]}" if log else "")


def _seconds_left(outcomes: list, jobs: list, slots: int) -> float:
    """The time the cells that have not ended may take, by the mean of those like them that ran; 0: unknown."""
    ran = [o for o in outcomes if o.state == "done"]
    if not ran:
        return 0.0
    ended = {o.job.name for o in outcomes}
    total = 0.0
    for job in jobs:
        if job.name not in ended:
            like = [o.seconds for o in ran if o.job.kind == job.kind] or [o.seconds for o in ran]
            total += sum(like) / len(like)
    return total / slots


def last_lines(log: Path, count: int) -> str:
    """The last `count` lines of a log that are not empty; of a progress bar its last state."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        text = file.read().decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "\n".join(lines[-count:])
