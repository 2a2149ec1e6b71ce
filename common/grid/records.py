"""What a grid keeps of its cells beside their folders: one small JSON and one log a cell, in RESULTS/grid."""

import os
import signal
import socket
from pathlib import Path
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.base.files import fitting_name, read_json, write_json
from backbench.common.grid.plan import Job

REQUEUE = 75  # a cell's exit code after a signal: a checkpoint is there, the same command goes on


def record_file(records: Path, job: Job) -> Path:
    """A job's record; its log lies beside it, ending in .log."""
    name = fitting_name(job.name.replace("/", "~"), 235)  # it is written under a longer name, then renamed
    return records / f"{name}.json"


def read_record(records: Path, job: Job) -> dict[str, Any]:
    """What a job's record says; nothing where there is none, or a damaged one."""
    try:
        return read_json(record_file(records, job))
    except UserError:
        return {}


def write_record(records: Path, job: Job, state: str, **facts: Any) -> None:
    """Record that a job is running, queued, done or failed, and where."""
    entry = {"state": state, "host": socket.gethostname(), "folder": str(job.folder), **facts}
    write_json(record_file(records, job), entry)


def at_work(record: dict[str, Any], job: Job) -> bool:
    """Whether the process of a record of this machine is alive, and is the job's."""
    if record.get("state") != "running" or record.get("host") != socket.gethostname():
        return False
    try:
        command = Path(f"/proc/{int(record['pid'])}/cmdline").read_bytes()
    except (OSError, KeyError, ValueError):
        return False
    return job.command[0].encode() in command


def may_retry(code: int) -> bool:
    """Whether a second try makes sense: after a signal, a kill for memory, a stop with a checkpoint."""
    return code < 0 or code in (REQUEUE, 128 + signal.SIGKILL, 128 + signal.SIGTERM)


def describe_exit(code: int) -> str:
    """`exit code 2`, `killed by SIGKILL (out of memory?)`."""
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    return f"exit code {code}"


def threads_of(slots: int) -> int:
    """The threads of a cell when `slots` share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // slots)
