"""Mistakes a user can mend: one line that says what, where and what to do; exit code 2."""

import errno
import sys
from collections.abc import Callable, Iterator

from backbench.common.base.console import close_streams, open_streams

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class UserError(Exception):
    """Raised for bad input. The message is one line: what is wrong, where (file, object, key), what to do."""

    code = 2  # of the process that it ends


class Interrupted(UserError):
    """Raised where nothing is wrong with the input and the same command goes on from what was saved."""

    code = 75  # EX_TEMPFAIL: a grid tries once more


def run_main(main: Callable[[], int | None]) -> None:
    """Call an entry script's `main` and exit; what a user can mend (`UserError`, a full disk, a place that may not be
    written) is one line and exit code 2. What cannot be printed never ends the work."""
    open_streams()
    sys.exit(close_streams(_call(main)))


def _call(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        # a loader process hands its traceback on inside the message
        line = str(error).rsplit(f"{UserError.__module__}.UserError: ", 1)[-1]
        return _say(" ".join(line.split()), error.code)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 130
    except OSError as error:
        if is_disk_full(error):
            return _say(f"no space left writing {error.filename or 'a file'}: free some space, run again")
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return _say("too many open files: raise the limit (ulimit -n 4096), or use fewer --workers")
        if error.filename and error.errno in REFUSED:
            return _say(f"{error.filename}: {error.strerror}; give another path, or mend this one")
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides (torch.save's own hides it), is that of a full disk or quota."""
    return any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in with_hidden(error))


def with_hidden(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _say(line: str, code: int = 2) -> int:
    print(f"error: {line}", file=sys.stderr)
    return code
