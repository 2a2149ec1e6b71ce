"""Standard output and error that no encoding, closed descriptor or full disk turns into the end of a run."""

import codecs
import errno
import io
import os
import select
import signal
import sys
from typing import TextIO

PLAIN = "backbench.plain"  # an error handler of `str.encode`
ASCII = dict(
    zip(
        "→×±−–—…·≥≤≈°²“”‘’λσμ",
        ("->", "x", "+-", "-", "-", "-", "...", ".", ">=", "<=", "~", " deg", "2", '"', '"', "'", "'")
        + ("lambda", "sigma", "mu"),
    )
)


def open_streams() -> None:
    """Make the process's own stdout and stderr (not what a test or a notebook put in their place) take any text.

    What their encoding lacks is written in ASCII. A closed one, and one that fails while it is written to, takes
    nothing more, and the run goes on; `close_streams` tells.
    """
    codecs.register_error(PLAIN, _plain)
    for number in range(3):  # or the next file to be opened would be the standard stream of a child
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=PLAIN))  # noqa: PTH123, SIM115
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, _lasting(stream, number))


def close_streams(code: int) -> int:
    """Flush both streams; the exit code of a run that ended with `code`, another one if stdout could not be written."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    lost = getattr(_raw(sys.stdout), "lost", None)
    if code or lost is None:
        return code
    if lost.errno == errno.EPIPE:  # whoever read our output had enough of it: `| head`
        return 128 + signal.SIGPIPE
    print(
        f"error: the output could not be written ({lost.strerror}); the run itself ended well",
        file=sys.stderr,
    )
    return 2


class _Output(io.FileIO):
    """A descriptor that drops what it cannot write; `lost` says why."""

    lost: OSError | None = None

    def write(self, data) -> int:
        if self.lost is None:
            try:
                while (written := super().write(data)) is None:  # a descriptor that does not wait
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.lost = error
        return len(data)


def _lasting(stream: TextIO, number: int) -> TextIO:
    raw = _Output(number, "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=PLAIN,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end
