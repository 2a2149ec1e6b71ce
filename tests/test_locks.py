"""Locks end with their holder, whoever it started; file systems without locks are said and lived with."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout, UnixFileLock

from backbench.common.base.locks import holder, lock, locked

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import os, sys, time
from pathlib import Path
import backbench.common.base.locks
{before}
held = backbench.common.base.locks.lock(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
time.sleep(600)
"""
WITHOUT = """
import errno, filelock
def refuse(self):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
filelock.UnixFileLock._acquire = refuse
"""


def killed(path: Path, before: str = "") -> int:
    """A process that holds the lock and has a forked child is killed; the child's number."""
    command = [sys.executable, "-c", HOLD.format(before=before), str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        with pytest.raises(Timeout):
            lock(path, 0)
        process.kill()
    return child


def without_locks(monkeypatch, number: int) -> None:
    def refuse(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(UnixFileLock, "_acquire", refuse)


def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path):
    child = killed(tmp_path / ".lock")
    try:
        lock(tmp_path / ".lock", 60).release()  # the child lets go when it first runs
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["ENOLCK", "ENOTSUP", "ENOSYS", "EIO"])
def test_a_file_system_without_locks_is_said_and_a_file_stands_in(tmp_path, monkeypatch, capfd, name):
    without_locks(monkeypatch, getattr(errno, name))
    child = killed(tmp_path / ".lock", WITHOUT.format(name=name))
    os.kill(child, signal.SIGKILL)
    assert f"process {child}" not in holder(tmp_path / ".lock")
    assert "if that has ended, delete" in holder(tmp_path / ".lock")
    held = lock(tmp_path / ".lock", 0)  # the killed one's is taken over
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"note: {tmp_path}: no locks on this file system ({os.strerror(getattr(errno, name))})"
    )
    assert f"(process {os.getpid()} of host " in holder(tmp_path / ".lock")
    with pytest.raises(Timeout):
        lock(tmp_path / ".lock", 0)
    held.release()
    assert holder(tmp_path / ".lock") == ""


def test_another_failure_is_none_of_the_file_system(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EACCES)
    with pytest.raises(PermissionError), locked(tmp_path / "array"):
        pass
