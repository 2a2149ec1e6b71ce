"""METEOR 1.5 through its jar, in pycocoevalcap: long-lived processes over stdin and stdout, nothing written beside it.

pycocoevalcap starts Java for every call and loads the whole paraphrase table each time.
"""

import gzip
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from backbench.captioning import paraphrases
from backbench.captioning.java import JavaError, JavaLines, find_jar, find_java, one_line
from backbench.common.base.cache import cache_folder
from backbench.common.base.errors import UserError
from backbench.common.base.files import digest, write_atomic
from backbench.common.metrics.captions import meteor_counts

MANY = 1000  # captions from which a second process pays
CHUNK = 200  # captions sent at a time where two processes share them


@dataclass
class _Process:
    """A running METEOR and the words (pieces of them) whose paraphrases it knows."""

    java: JavaLines
    captions: set[str]
    references: set[str]


class Meteor:
    """METEOR's alignments; `common.metrics.captions.meteor_score` turns them into scores.

    One process, started early. Many captions are shared with a second one where there are two cores. A system with
    words that the first does not know the paraphrases of needs a process that does: it is the second one, and the
    first meanwhile scores the captions without such words.
    """

    def __init__(self, timeout: float = 120.0) -> None:
        self._timeout = timeout
        self._processes: list[_Process] = []  # the one that knows most words first

    def start(self, captions: Iterable[str], references: Iterable[str]) -> None:
        """Start Java with the paraphrases of the words of captions and references; returns while it still loads.

        Raises JavaError when Java is not there.
        """
        wanted, given = paraphrases.pieces(captions), paraphrases.pieces(references)
        first = self._processes[0] if self._processes else None
        if first is None or not (wanted <= first.captions and given <= first.references):
            if first is not None and given <= first.references:
                wanted, given = wanted | first.captions, first.references
            self.close()
            self._processes = [self._new(wanted, given)]
        self._processes[0].java.start()

    def __call__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """METEOR's statistics (n, 23) of n tokenised captions, each at its best reference. Raises JavaError."""
        flat = [sentence for image in references for sentence in image]
        lines = [
            " ||| ".join(["SCORE", *map(_plain, refs), _plain(hyp)])
            for hyp, refs in zip(hypotheses, references)
        ]
        if len(lines) < MANY or _cores() < 2:
            self.start(hypotheses, flat)
            answers = self._processes[0].java.ask(lines)
        else:
            answers = self._share(lines, hypotheses, flat)
        try:
            raw = np.array([[float(x) for x in a.split()] for a in answers]).reshape(len(lines), 23)
        except ValueError:
            bad = next(a for a in answers if len(a.split()) != 23 or a.startswith("Error"))
            raise JavaError(f"METEOR answered {bad!r}") from None
        return meteor_counts(raw)

    def _share(self, lines: list[str], hypotheses: Sequence[str], references: list[str]) -> list[str]:
        """Answers to `lines`, worked off by two processes."""
        wanted, given = paraphrases.pieces(hypotheses), paraphrases.pieces(references)
        if self._processes and not given <= self._processes[0].references:
            self.close()  # other references
        if not self._processes:
            self._processes = [self._new(wanted, given)]
        first = self._processes[0]
        known = [paraphrases.pieces([caption]) <= first.captions for caption in hypotheses]
        anyone = deque(_chunks([i for i, k in enumerate(known) if k]))
        second_only = deque(_chunks([i for i, k in enumerate(known) if not k]))
        answers = [""] * len(lines)

        def work(process: _Process, queues: Sequence[deque]) -> None:
            for queue in queues:
                while queue:
                    try:
                        chunk = queue.popleft()
                    except IndexError:  # the other process was faster
                        break
                    for i, answer in zip(chunk, process.java.ask([lines[i] for i in chunk])):
                        answers[i] = answer

        def work_second() -> None:
            second = self._processes[1] if len(self._processes) > 1 else None
            if second is None or not (wanted <= second.captions and given <= second.references):
                if second is not None:
                    second.java.close()
                    self._processes.pop()
                second = self._new(wanted | first.captions, first.references)
                self._processes.append(second)
            work(second, [second_only, anyone])

        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(work, first, [anyone]), pool.submit(work_second)]
            for job in jobs:
                if job.exception():
                    anyone.clear()
                    second_only.clear()
        for job in jobs:
            job.result()
        self._processes.sort(key=lambda process: -len(process.captions))
        return answers

    def _new(self, captions: set[str], references: set[str]) -> _Process:
        find_java()
        jar, table = find_jar("meteor", "meteor-1.5.jar"), _paraphrase_table(captions, references)
        arguments = ["-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm", "-a", str(table)]
        return _Process(JavaLines("METEOR", arguments, self._timeout), captions, references)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.java.close()
        self._processes = []


def _chunks(indices: list[int]) -> list[list[int]]:
    return [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(sentence: str) -> str:
    return one_line(sentence.replace("|||", ""))


def _paraphrase_table(captions: set[str], references: set[str]) -> Path:
    """The table cut down to these words, from the cache folder or made there: in 4 s, for known references in one."""
    table, words = find_jar("meteor", "data", "paraphrase-en.gz"), [sorted(references), sorted(captions)]
    try:
        folder, key = cache_folder("meteor"), digest("near 1", table.stat().st_size, words[0])
        near, path = folder / f"{key}.txt", folder / f"{digest(key, words[1])}.gz"
        if not path.exists():
            if not near.exists():
                lines = paraphrases.near(table, words[0])
                write_atomic(near, lambda file: file.write(lines))
            kept = paraphrases.cut(near.read_bytes(), *words)
            write_atomic(path, lambda file: file.write(gzip.compress(kept, 1)))
    except (UserError, OSError):
        return table  # no place for a cache: slower, not wrong
    return path
