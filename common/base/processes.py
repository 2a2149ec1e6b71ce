"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys

PARENT = os.getppid()  # of this process when it began


def die_with(parent: int) -> None:
    """Have the system kill this process when its parent, the process numbered `parent`, ends (Linux)."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)
