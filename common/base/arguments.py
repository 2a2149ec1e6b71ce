"""Command lines: a mistake is one line, and numbers are held to their range."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, without the usage, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def whole(low: int = 0) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` on."""

    def read(text: str) -> int:
        digits = text.removeprefix("+")
        if not (digits.isascii() and digits.isdecimal() and int(digits) >= low):
            raise argparse.ArgumentTypeError(f"{text}: a whole number from {low} on is needed")
        return int(digits)

    return read


def positive(text: str) -> float:
    """The type of an argument that is a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value
