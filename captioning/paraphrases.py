"""METEOR's paraphrase table cut down to the words of some text: loads in a second, the same scores.

METEOR reads 5.3 million paraphrase pairs at every start, most of its running time; a pair counts only when one phrase
stands in a caption and the other in a reference.
"""

import gzip
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

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


def cut(table: Path, references: Iterable[str], captions: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """The pairs that can count, in the table's order: one phrase made of pieces of `references`, one of `captions`.

    `table` is METEOR's (gzip: probability, phrase, phrase, a line each). A piece is looked up by a hash, and one with
    letters beyond ASCII passes: a few pairs too many are kept, which count for nothing.
    """
    known = np.zeros(1 << BITS, np.uint8)  # 1: of the references, 2: of the captions
    for bit, words in ((1, references), (2, captions)):
        if words := sorted(words):
            known[_hashes(np.frombuffer(" ".join(words).encode(), np.uint8))[0]] |= bit

    def keep(text: bytes) -> list[tuple[bytes, bytes]]:
        kept = []
        block = np.frombuffer(text, np.uint8)
        hashes, starts, foreign = _hashes(block)
        bits = known[hashes]
        bits[foreign] = 3
        ends = np.flatnonzero(block == NEWLINE)
        line = np.cumsum(block == NEWLINE, dtype=np.int32)[starts]
        made = np.ones(
            (2, len(ends)), bool
        )  # whether a line is made of pieces of the references, of the captions
        made[0, line[bits & 1 == 0]] = False
        made[1, line[bits & 2 == 0]] = False
        first, second = made[:, 1::3], made[:, 2::3]
        for k in np.flatnonzero((first[0] & second[1]) | (first[1] & second[0])).tolist():
            one, two, three = ends[3 * k : 3 * k + 3]
            kept.append((text[one + 1 : two], text[two + 1 : three]))
        return kept

    with ThreadPoolExecutor(2) as pool:
        return list(chain.from_iterable(pool.map(keep, _blocks(table))))


def write_table(path: Path, pairs: Iterable[tuple[bytes, bytes]]) -> None:
    """Write pairs as METEOR reads them; it reads the probability and does not use it."""
    path.write_bytes(gzip.compress(b"".join([b"1\n%b\n%b\n" % pair for pair in pairs]), 1))


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
    if len(_cache.get(factor, ())) < count:
        steps = np.full(count, factor, np.uint32)
        steps[0] = 1
        _cache[factor] = np.multiply.accumulate(steps, dtype=np.uint32)
    return _cache[factor][:count]


def _blocks(table: Path) -> Iterator[bytes]:
    """The table's text in parts of whole groups of three lines, unpacked in a thread ahead of their use."""
    with gzip.open(table) as source, ThreadPoolExecutor(1) as ahead:
        tail, coming = b"", ahead.submit(source.read, BLOCK)
        while block := coming.result():
            coming = ahead.submit(source.read, BLOCK)
            text = tail + block
            lines = np.flatnonzero(np.frombuffer(text, np.uint8) == NEWLINE)
            end = int(lines[len(lines) // 3 * 3 - 1]) + 1 if len(lines) > 2 else 0
            tail = text[end:]
            if end:
                yield text[:end]
