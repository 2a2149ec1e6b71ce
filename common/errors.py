"""Mistakes a user can mend: one line that says what, where and what to do; exit code 2."""

import errno
import os
import signal
import sys
from collections.abc import Callable

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class UserError(Exception):
    """Raised for bad input. The message is one line: what is wrong, where (file, object, key), what to do."""


def run_main(main: Callable[[], int | None]) -> None:
    """Call an entry script's `main`; what a user can mend (`UserError`, a full disk, a place that may not be written)
    is one line and exit code 2."""
    try:
        code = main() or 0
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        # a loader process hands its traceback on inside the message
        line = str(error).rsplit(f"{UserError.__module__}.UserError: ", 1)[-1]
        sys.exit(_say(" ".join(line.split())))
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has enough of it: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if is_disk_full(error):
            sys.exit(
                _say(f"no space left writing {error.filename or 'the output'}: free some space, run again")
            )
        if error.filename and error.errno in REFUSED:
            sys.exit(_say(f"{error.filename}: {error.strerror}; give another path, or mend this one"))
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides (torch.save's own hides it), is that of a full disk or quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2
