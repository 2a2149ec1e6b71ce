"""METEOR's paraphrase table cut down to the words of some text: loads in a second, the same scores.

METEOR reads 5.3 million paraphrase pairs at every start, most of its running time; a pair counts only when one phrase
stands in a caption and the other in a reference.
"""

import gzip
import io
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

PIECE = re.compile(r"[^\W\d_]+|\d+")
BLOCK = 1 << 19  # bytes of the unpacked table (270 MB) at a time: what a core's cache holds
BITS = 22  # of a piece's hash
FACTOR, MIX = 0x9E3779B1, 0x85EBCA77  # odd: they have inverses modulo 2^32
NEWLINE = ord("\n")
KINDS = np.array(
    [1 if chr(b).isalpha() or b > 127 else 2 if chr(b).isdigit() else 0 for b in range(256)], np.uint8
)


def pieces(sentences: Iterable[str]) -> set[str]:
    """The runs of letters and runs of digits in sentences, in lower case.

    However METEOR splits a sentence at punctuation, its words are made of these.
    """
    return set(PIECE.findall(" ".join(sentences).lower()))


def near(table: Path, references: Iterable[str]) -> bytes:
    """The lines of METEOR's table (gzip: probability, phrase, phrase) with a phrase made of pieces of `references`.

    A piece is looked up by a hash, and one with letters beyond ASCII passes: a few pairs too many are kept, here and in
    `cut`, which count for nothing.
    """
    known = _known(references)
    with gzip.open(table) as source:
        return _filtered(source, known, lambda first, second: first[0] | second[0])


def cut(lines: bytes, references: Iterable[str], captions: Iterable[str]) -> bytes:
    """Those of `near`'s lines that can count: one phrase made of pieces of `references`, the other of `captions`."""
    known = _known(references, captions)
    return _filtered(
        io.BytesIO(lines), known, lambda first, second: (first[0] & second[1]) | (first[1] & second[0])
    )


def _known(*texts: Iterable[str]) -> np.ndarray:
    """uint8 by hash: bit k set for the pieces of the k-th text."""
    known = np.zeros(1 << BITS, np.uint8)
    for k, words in enumerate(texts):
        known[_hashes(np.frombuffer(" ".join(words).encode(), np.uint8))[0]] |= 1 << k
    return known


def _filtered(
    source: BinaryIO, known: np.ndarray, rule: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> bytes:
    """The groups of three lines that `rule` keeps, in order; it is given bool (2, n) of their phrases, by bit."""

    def keep(text: bytes) -> bytes:
        block = np.frombuffer(text, np.uint8)
        hashes, starts, foreign = _hashes(block)
        bits = known[hashes]
        bits[foreign] = 3
        breaks = block == NEWLINE
        line = np.cumsum(breaks, dtype=np.int32)[starts]
        ends = np.flatnonzero(breaks) + 1
        made = np.ones((2, len(ends)), bool)  # whether all pieces of a line are known, by bit
        made[0, line[bits & 1 == 0]] = False
        made[1, line[bits & 2 == 0]] = False
        groups = np.append(0, ends[2::3])
        kept = np.flatnonzero(rule(made[:, 1::3], made[:, 2::3]))
        return b"".join([text[a:z] for a, z in zip(groups[kept].tolist(), groups[kept + 1].tolist())])

    with ThreadPoolExecutor(2) as pool:
        return b"".join(pool.map(keep, _blocks(source)))


def _hashes(text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of UTF-8 bytes: its pieces' hashes, where they start, and which hold bytes beyond ASCII.

    A hash is the polynomial of a piece's bytes, got from running sums over the whole text.
    """
    kind = np.pad(KINDS[text], 1)
    change = kind[1:] != kind[:-1]
    starts = np.flatnonzero(change[:-1] & (kind[1:-1] > 0))
    lasts = np.flatnonzero(change[1:] & (kind[1:-1] > 0))
    powers, inverses = _powers(FACTOR, len(text)), _powers(pow(FACTOR, -1, 1 << 32), len(text))
    terms = text * powers
    sums = np.cumsum(terms, dtype=np.uint32)
    values = (sums[lasts] - sums[starts] + terms[starts]) * inverses[starts] * np.uint32(MIX)
    foreign = np.searchsorted(starts, np.flatnonzero(text > 127), side="right") - 1
    return values >> np.uint32(32 - BITS), starts, foreign


_cache: dict[int, np.ndarray] = {}


def _powers(factor: int, count: int) -> np.ndarray:
    """uint32 (count,): 1, factor, factor² … modulo 2^32."""
    if factor not in _cache or len(_cache[factor]) < count:
        steps = np.full(max(count, 1), factor, np.uint32)
        steps[0] = 1
        _cache[factor] = np.multiply.accumulate(steps, dtype=np.uint32)
    return _cache[factor][:count]


def _blocks(source: BinaryIO) -> Iterator[bytes]:
    """A text in parts of whole groups of three lines, read (and unpacked) in a thread ahead of their use."""
    with ThreadPoolExecutor(1) as ahead:
        tail, coming = b"", ahead.submit(source.read, BLOCK)
        while block := coming.result():
            coming = ahead.submit(source.read, BLOCK)
            text = tail + block
            lines = np.flatnonzero(np.frombuffer(text, np.uint8) == NEWLINE)
            end = int(lines[len(lines) // 3 * 3 - 1]) + 1 if len(lines) > 2 else 0
            tail = text[end:]
            if end:
                yield text[:end]
