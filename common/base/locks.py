"""Locks between processes: of several one goes on, and the system frees its lock when it dies, however it dies."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

# how NFS, Lustre and FUSE say that they know no flock
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO)


def lock(path: Path, timeout: float = -1) -> BaseFileLock:
    """Lock the file `path` until the lock is released, dropped, or the process ends.

    Waits `timeout` seconds for another holder, -1: for ever; raises filelock.Timeout then. A forked child (a loader
    process) does not hold the lock. Where the file system knows no locks it says so, and the file PATH.held names the
    holder while it lives: one left by a process that died is taken over, on this machine; on another it must be
    deleted by hand.
    """
    held = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire(timeout)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        reason = error.strerror
    else:
        return held
    held = SoftFileLock(f"{path}.held", thread_local=False)
    print(
        f"note: {path.parent}: no locks on this file system ({reason}), {held.lock_file} stands in",
        file=sys.stderr,
    )
    held.acquire(timeout)
    return held


def holder(path: Path) -> str:
    """Who holds `path` where PATH.held stands in for a lock: ` (process 12 of host a; …)`, else nothing."""
    file = Path(f"{path}.held")
    try:
        pid, host = file.read_text(encoding="utf-8").split()[:2]
    except (OSError, ValueError):
        return ""
    return f" (process {pid} of host {host}; if that has ended, delete {file})"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`: of several processes one computes, the others wait and find it done."""
    held = lock(path.with_name(path.name + ".lock"))
    try:
        yield
    finally:
        held.release()
