"""Mistakes a user can mend: one line that says what, where and what to do; exit code 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Raised for bad input. The message is one line: what is wrong, where (file, object, key), what to do."""


def run_main(main: Callable[[], int | None]) -> None:
    """Call an entry script's `main`, turn `UserError` and a full disk into one line and exit code 2."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        sys.exit(_say(" ".join(str(error).split())))
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            sys.exit(
                _say(f"no space left writing {error.filename or 'the output'}: free some space, run again")
            )
        raise


def _say(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2
