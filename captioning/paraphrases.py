"""METEOR's paraphrase table as arrays, and cut down to the words of some text: loads in a second, the same scores.

METEOR reads 5.3 million paraphrase pairs at every start (8 s, most of its running time); a pair counts only when one
phrase stands in a caption and the other in a reference. The arrays are made once (by this file run in a process of its
own, for it takes most of a gigabyte); a cut is then a few vectorised look-ups.
"""

import gzip
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PIECE = re.compile(r"[^\W\d_]+|\d+")
BLOCK = 1 << 22  # bytes of the unpacked table (270 MB) in memory at a time


def pieces(sentences: Iterable[str]) -> set[str]:
    """The runs of letters and runs of digits in sentences, in lower case.

    However METEOR splits a sentence at punctuation, its words are made of these.
    """
    return set(PIECE.findall(" ".join(sentences).lower()))


def index(table: Path) -> dict[str, np.ndarray]:
    """A table (gzip: probability, phrase, phrase, a line each) as arrays, its order kept.

    "pairs" int32 (n, 2): phrases by number; "starts" int32 (phrases + 1,) into "words" int32: a phrase's words by
    number; "vocabulary" uint8: the words, a line each.
    """
    numbers, vocabulary = _numbering(), _numbering()
    pairs = []
    for lines in _read(table):
        columns = [np.fromiter(map(numbers.__getitem__, lines[k::3]), np.int32) for k in (1, 2)]
        pairs.append(np.stack(columns, 1))
    text = b"\n".join(numbers)
    gaps = np.frombuffer(text, np.uint8)
    gaps = gaps[(gaps == ord("\n")) | (gaps == ord(" "))]
    ends = [*(np.flatnonzero(gaps == ord("\n")) + 1), len(gaps) + 1]
    words = text.replace(b"\n", b" ").split(b" ")
    return {
        "pairs": np.concatenate(pairs),
        "starts": np.array([0, *ends], np.int32),
        "words": np.fromiter(map(vocabulary.__getitem__, words), np.int32),
        "vocabulary": np.frombuffer(b"\n".join(vocabulary), np.uint8),
    }


def cut(
    arrays: dict[str, np.ndarray], references: Iterable[str], captions: Iterable[str]
) -> list[tuple[bytes, bytes]]:
    """The pairs that can count, in the table's order: one phrase made of pieces of `references`, one of `captions`."""
    vocabulary = arrays["vocabulary"].tobytes().split(b"\n")
    made = [PIECE.findall(word.decode()) for word in vocabulary]
    starts, words, (first, second) = arrays["starts"], arrays["words"], arrays["pairs"].T

    def possible(wanted: Iterable[str]) -> np.ndarray:
        """bool (phrases,): whether all words of a phrase are made of the wanted pieces."""
        whole = set(wanted).issuperset
        known = np.fromiter(map(whole, made), bool, len(made))
        return np.logical_and.reduceat(known[words], starts[:-1])

    ours, theirs = possible(references), possible(captions)
    kept = np.flatnonzero((ours[first] & theirs[second]) | (theirs[first] & ours[second]))
    phrases = {
        p: b" ".join([vocabulary[w] for w in words[starts[p] : starts[p + 1]].tolist()])
        for p in np.unique(arrays["pairs"][kept]).tolist()
    }
    return [(phrases[a], phrases[b]) for a, b in arrays["pairs"][kept].tolist()]


def write_table(path: Path, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    """Write pairs as METEOR reads them; it reads the probability and does not use it."""
    path.write_bytes(gzip.compress(b"".join([b"1\n%b\n%b\n" % pair for pair in pairs]), 1))


def _numbering() -> defaultdict[bytes, int]:
    """Numbers what it is asked for from 0 on."""
    made: defaultdict[bytes, int] = defaultdict()
    made.default_factory = made.__len__
    return made


def _read(table: Path) -> Iterable[list[bytes]]:
    """The lines of a table, some whole groups of three at a time, unpacked in a thread ahead of their use."""
    with gzip.open(table) as source, ThreadPoolExecutor(1) as ahead:
        tail, coming = b"", ahead.submit(source.read, BLOCK)
        while block := coming.result():
            coming = ahead.submit(source.read, BLOCK)
            lines = (tail + block).split(b"\n")
            end = (len(lines) - 1) // 3 * 3
            tail = b"\n".join(lines[end:])
            yield lines[:end]


if __name__ == "__main__":
    np.savez(sys.argv[2], **index(Path(sys.argv[1])))
