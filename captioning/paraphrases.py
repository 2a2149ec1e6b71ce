"""METEOR's paraphrase table cut down to the words of some text: loads in a second, gives the same scores.

METEOR reads 5.3 million paraphrase pairs at every start (8 s, most of its running time); a pair counts only when one
phrase stands in a caption and the other in a reference. Run as a file, in a process of its own: first the pairs of
which one phrase can stand in the references, kept for every system scored against them, then of these the pairs of
which the other can stand in a caption.
"""

import gzip
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PIECE = re.compile(r"[^\W\d_]+|\d+")
BLOCK = 1 << 22  # bytes of the unpacked table (270 MB) in memory at a time


def pieces(sentences: Iterable[str]) -> set[str]:
    """The runs of letters and runs of digits in sentences, in lower case.

    However METEOR splits a sentence at punctuation, its words are made of these.
    """
    return set(PIECE.findall(" ".join(sentences).lower()))


class _Words(dict):
    """word → whether it is made of the wanted pieces, worked out when first asked."""

    def __init__(self, wanted: Iterable[str]) -> None:
        super().__init__()
        self.wanted = set(wanted)

    def __missing__(self, word: bytes) -> bool:
        self[word] = found = self.wanted.issuperset(PIECE.findall(word.decode()))
        return found


class _Phrases(dict):
    """phrase → whether all its words are made of the wanted pieces; for phrases that come again and again."""

    def __init__(self, word: Callable[[bytes], bool]) -> None:
        super().__init__()
        self.word = word

    def __missing__(self, phrase: bytes) -> bool:
        self[phrase] = found = all(map(self.word, phrase.split()))
        return found


def filter_table(
    table: Path,
    out: Path,
    references: Iterable[str],
    captions: Iterable[str] | None = None,
    span: tuple[int, int | None] = (0, None),
) -> None:
    """Copy the pairs of `table` (gzip: probability, phrase, phrase, a line each) that can count.

    One phrase is made of pieces of `references`, the other of `captions` (None: of anything). Keeps the table's
    order; writes `out` atomically. `span`: see `_read`.
    """
    ours = _Words(references).__getitem__
    # the table is sorted by its first phrase, so that only those are worth remembering
    first_ours = _Phrases(ours)
    if captions is not None:
        theirs = _Words(captions).__getitem__
        first_theirs = _Phrases(theirs)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with gzip.open(temporary, "wb", 1) as target:
        for lines in _read(table, *span):
            pairs = zip(lines[1::3], lines[2::3])
            if captions is None:
                kept = [(a, b) for a, b in pairs if first_ours[a] or all(map(ours, b.split()))]
            else:
                kept = [
                    (a, b)
                    for a, b in pairs
                    if (first_ours[a] and all(map(theirs, b.split())))
                    or (first_theirs[a] and all(map(ours, b.split())))
                ]
            # METEOR reads the probability and does not use it
            target.write(b"".join([b"1\n%b\n%b\n" % pair for pair in kept]))
    temporary.replace(out)


def _read(table: Path, first: int, last: int | None) -> Iterator[list[bytes]]:
    """Lines, in whole groups of three, of the groups that begin at bytes `first` … `last` of the unpacked table.

    Both are multiples of BLOCK; None is its end.
    """
    with gzip.open(table) as source:
        newlines, before, tail = 0, b"\n", b""
        for _ in range(first // BLOCK):
            block = source.read(BLOCK)
            newlines, before = newlines + block.count(b"\n"), block[-1:]
        skip = 0 if newlines % 3 == 0 and before == b"\n" else 3 - newlines % 3  # lines of the group before
        at = first
        while block := source.read(BLOCK):
            lines = (tail + block).split(b"\n")[skip:]
            if at == last:  # what begins here is another's; the group that was cut is ours
                if tail:
                    yield lines[:3]
                return
            skip, at, end = 0, at + len(block), (len(lines) - 1) // 3 * 3
            tail = b"\n".join(lines[end:])
            yield lines[:end]


def filter_by_two(table: Path, out: Path, references: Iterable[str]) -> None:
    """`filter_table` for references alone, by two processes, each half of the table."""
    with table.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        size = int.from_bytes(file.read(), "little")  # unpacked, as gzip notes it
    middle = size // 2 // BLOCK * BLOCK
    spans = [(0, middle), (middle, None)] if middle else [(0, None)]
    parts = [out.with_name(f".{out.name}.{os.getpid()}.{k}.tmp") for k in range(len(spans))]
    with ProcessPoolExecutor(len(spans)) as pool:
        for job in [
            pool.submit(filter_table, table, *p, None, s) for *p, s in zip(parts, [references] * 2, spans)
        ]:
            job.result()
    with parts[0].open("ab") as whole:
        for part in parts[1:]:
            whole.write(part.read_bytes())  # gzip files one after the other are a gzip file
            part.unlink()
    parts[0].replace(out)


if __name__ == "__main__":
    full, half, cut = map(Path, sys.argv[1:])
    text = json.load(sys.stdin)
    if not half.exists():
        filter_by_two(full, half, text["references"])
    filter_table(half, cut, text["references"], text["captions"])
