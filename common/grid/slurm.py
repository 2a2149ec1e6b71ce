"""The SLURM executor: job arrays by submitit; a preempted or requeued cell resumes, to the same numbers.

Nothing is asked of SLURM's accounting (many clusters, and the one of the tests, have none): a cell's own record says
how it ended, and squeue whether a job without one is still there.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbench.common.base.errors import UserError
from backbench.common.base.files import make_folder
from backbench.common.grid.display import Display
from backbench.common.grid.local import Outcome, Running, has_cell, start
from backbench.common.grid.plan import Job
from backbench.common.grid.records import REQUEUE, describe_exit, may_retry, read_record, write_record
from backbench.common.grid.status import slurm_queue
from backbench.common.run.keys import ROOT

PLAIN = ("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb")  # submitit's own; others are SLURM's
SINGLE = (
    "nodes",
    "tasks_per_node",
    "ntasks_per_node",
    "gpus_per_node",
    "gpus_per_task",
)  # of a cell, at most one
POLL_SECONDS = 1.0


class CellTask:
    """What a SLURM job calls: one cell, in a process of its own. Requeued, it is called again, and the cell resumes."""

    def __init__(self, job: Job, records: Path, folder: Path, threads: int, submission: str) -> None:
        self.job, self.records, self.folder = job, records, folder
        self.threads, self.submission = threads, submission

    def __call__(self) -> int:
        """Run the cell, once more where that makes sense, and record how it ended."""
        os.chdir(self.folder)
        began, restarts = time.monotonic(), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        job = replace(self.job, restart=self.job.restart and not restarts)
        facts = {"slurm": slurm_id(), "submission": self.submission, "restarts": restarts}
        code = self._once(job, facts)
        if may_retry(code):
            if code in (REQUEUE, -signal.SIGKILL):
                time.sleep(60)  # SLURM is about to end this job too; where it is not, the cell goes on
            code = self._once(replace(job, restart=False), facts)
        seconds = round(time.monotonic() - began, 2)
        if code == 0 and has_cell(job):
            write_record(self.records, job, "done", seconds=seconds, **facts)
        else:
            why = describe_exit(code) if code else f"it ended well, but left no cell in {job.folder}"
            write_record(self.records, job, "failed", why=why, code=code, seconds=seconds, **facts)
        return code

    def checkpoint(self, *_: Any) -> Any:
        """Before a time limit (submitit's signal): let the cell save its state; the same call goes on after it."""
        from submitit.helpers import DelayedSubmission

        if _at_work:
            process = _at_work[-1].process
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # it has ended, and `_once` knows
                # not process.wait(): the call that this signal interrupts holds its lock
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(self)

    def _once(self, job: Job, facts: dict[str, Any]) -> int:
        _at_work.append(start(job, self.records, {"OMP_NUM_THREADS": str(self.threads)}, **facts))
        return _at_work[-1].process.wait()


_at_work: list[Running] = []  # of this process: not pickled with a task


def slurm_id() -> str:
    """This job as squeue -r names it: 12, or 12_3 of an array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def run_slurm(
    jobs: list[Job], records: Path, parameters: dict[str, Any], is_done: Callable[[Job], bool]
) -> list[Outcome]:
    """Submit the jobs that are not done as job arrays, those that wait for a backbone file when it is there; wait.

    `parameters` are submitit's timeout_min, cpus_per_task, gpus_per_node, mem_gb, or SLURM's own (partition, account,
    qos, array_parallelism …). Jobs that an earlier call submitted are waited for, not submitted again. A job that
    vanished without a record is submitted once more. Raises UserError without submitit or SLURM.
    """
    executor = make_executor(make_folder(records) / "slurm", parameters)
    threads = int(parameters.get("cpus_per_task", 1))
    waiting, outcomes = list(jobs), []
    queue = slurm_queue()
    submitted = {job.name: job for job in jobs if read_record(records, job).get("slurm") in queue}
    waiting = [job for job in waiting if job.name not in submitted]
    tries = dict.fromkeys((job.name for job in jobs), 1)
    absent: dict[str, int] = {}
    with Display(len(jobs), 0) as display:
        try:
            while waiting or submitted:
                queue = slurm_queue()
                for job in list(submitted.values()):
                    outcome = _outcome(job, records, queue, absent)
                    if outcome is None:
                        continue
                    del submitted[job.name]
                    if outcome.state == "vanished" and tries[job.name] == 1:
                        tries[job.name] = 2
                        waiting.append(replace(job, restart=False))
                        display.line(f"{job.name}: its SLURM job vanished; submitted once more")
                        continue
                    if outcome.state == "vanished":
                        outcome = replace(outcome, state="failed")
                    outcomes.append(outcome)
                    display.line(f"{job.name}: {outcome.state} ({outcome.seconds:.0f} s)")
                ready = _ready(waiting, submitted, records, is_done, outcomes, tries)
                for job in ready:
                    waiting.remove(job)
                    submitted[job.name] = job
                if ready:
                    ids = submit(executor, ready, records, threads)
                    display.line(f"submitted {len(ready)} cells: SLURM jobs {ids[0]} … {ids[-1]}")
                display.show(outcomes, [], jobs)
                time.sleep(POLL_SECONDS if waiting or submitted else 0)
        except KeyboardInterrupt:
            display.line("the SLURM jobs go on; the same command waits for them again, scancel ends them")
            raise
    order = {job.name: number for number, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda outcome: order[outcome.job.name])


def make_executor(folder: Path, parameters: dict[str, Any]) -> Any:
    """submitit's executor for SLURM. Raises UserError without it, and for an unknown parameter or several GPUs."""
    for name in SINGLE:
        if str(parameters.get(name, 1)) not in ("0", "1"):
            raise UserError(
                f"--slurm {name}={parameters[name]}: a cell is one process on one GPU; --executor print prints the "
                "commands, and torchrun runs one on several"
            )
    try:
        import submitit
    except ImportError:
        raise UserError("--executor slurm needs submitit: pip install 'backbench[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=1000)
    except RuntimeError as error:
        raise UserError(f"--executor slurm: {error}; run it where sbatch and srun are") from None
    made = {k if k in PLAIN else f"slurm_{k}": v for k, v in parameters.items()}
    try:
        executor.update_parameters(**{"name": "backbench", "timeout_min": 24 * 60, **made})
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"--slurm {parameters}: {error}") from None
    return executor


def submit(executor: Any, jobs: list[Job], records: Path, threads: int) -> list[str]:
    """Submit jobs as one array; record and return their ids. Raises UserError when sbatch refuses."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    submission = str(time.time_ns())
    for job in jobs:
        write_record(records, job, "queued", submission=submission)
    try:
        with executor.batch():
            made = [executor.submit(CellTask(job, records, Path.cwd(), threads, submission)) for job in jobs]
    except subprocess.SubprocessError as error:
        raise UserError(f"sbatch refused: {error}") from None
    except Exception as error:
        if type(error).__name__ != "FailedJobError":
            raise
        raise UserError(f"sbatch refused: {error}") from None
    for job, handle in zip(jobs, made):
        if read_record(records, job).get("state") == "queued":  # it may have begun
            write_record(records, job, "queued", slurm=handle.job_id, submission=submission)
    return [handle.job_id for handle in made]


def _outcome(job: Job, records: Path, queue: dict[str, str], absent: dict[str, int]) -> Outcome | None:
    """How a submitted job ended, or None while it has not; "vanished": gone, and no record says how."""
    record = read_record(records, job)
    if record.get("state") in ("done", "failed"):
        return Outcome(job, record["state"], record.get("seconds", 0.0))
    absent[job.name] = 0 if record.get("slurm") in queue else absent.get(job.name, 0) + 1
    if absent[job.name] < 5:  # a record on a shared file system may come late
        return None
    absent[job.name] = 0
    why = f"SLURM job {record.get('slurm')} ended without saying how; see grid/slurm"
    write_record(records, job, "failed", why=why)
    return Outcome(job, "vanished", 0.0)


def _ready(
    waiting: list[Job],
    submitted: dict[str, Job],
    records: Path,
    is_done: Callable[[Job], bool],
    outcomes: list[Outcome],
    tries: dict[str, int],
) -> list[Job]:
    """The jobs to submit now; those that need not or cannot be are taken out, with their outcome."""
    busy = {*submitted, *(job.name for job in waiting)}
    ready = []
    for job in list(waiting):
        if job.needs in busy:
            continue
        if not job.ready():
            waiting.remove(job)
            write_record(records, job, "failed", why=f"its backbone {job.backbone} is not there")
            outcomes.append(Outcome(job, "failed", 0.0))
        elif not job.restart and tries[job.name] == 1 and is_done(job):
            waiting.remove(job)
            outcomes.append(Outcome(job, "done before", 0.0))
        else:
            ready.append(job)
    return ready
