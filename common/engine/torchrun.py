"""What torchrun (or another launcher) says in the environment, and joining the processes that it started."""

import datetime
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed as dist

from backbench.common.base.errors import UserError
from backbench.common.base.processes import PARENT, die_with

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = "unset WORLD_SIZE for one process, or start several with torchrun"
TORCHRUN_SECONDS = 30 * 60  # to wait for the others: torchrun watches over them
OTHERS_SECONDS = 60  # where nobody does, and the variables may be left over


@dataclass(frozen=True)
class Launch:
    """This process's number of how many, and its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int | None = None
    torchrun: bool = False


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started; alone without WORLD_SIZE. Raises UserError when the variables make no sense."""
    local = _number(environment, "LOCAL_RANK", 0) if "LOCAL_RANK" in environment else None
    world = _number(environment, "WORLD_SIZE", 1) if "WORLD_SIZE" in environment else 1
    if world == 1:
        return Launch(local=local)
    missing = [name for name in NAMES if not environment.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world} is set in the environment, {' and '.join(missing)} not: {ALONE}")
    rank = _number(environment, "RANK", 0, world - 1)
    _number(environment, "MASTER_PORT", 1, 2**16 - 1)
    return Launch(rank, world, local, "TORCHELASTIC_RUN_ID" in environment)


def join(launched: Launch, device: torch.device) -> None:
    """Join the process group (nccl or gloo). Raises UserError when the others do not come."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = ":".join(map(str, address))
    if launched.torchrun:
        die_with(PARENT)  # or a killed torchrun would leave its processes at work
    else:
        what = f"RANK={launched.rank}, WORLD_SIZE={launched.world}"
        print(f"waiting at {place} for the other processes ({what}; {ALONE})", file=sys.stderr, flush=True)
    seconds = TORCHRUN_SECONDS if launched.torchrun else OTHERS_SECONDS
    try:
        if not launched.torchrun:
            _find(address, launched.rank, time.monotonic() + seconds)
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
        store.set_timeout(datetime.timedelta(seconds=seconds))
        store.set(f"here/{launched.rank}", "")
        store.wait([f"here/{rank}" for rank in range(launched.world)])
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"WORLD_SIZE={launched.world}: the other processes did not come to {place} within {seconds} s "
            f"({reason}); {ALONE}"
        ) from None
    patience = datetime.timedelta(hours=2)  # process 0 evaluates while the others wait
    store.set_timeout(patience)
    gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=store,
        rank=launched.rank,
        world_size=launched.world,
        timeout=patience,
        device_id=device if gpu else None,  # or a barrier guesses which GPU is this process's
    )


def _find(address: tuple[str, int], rank: int, until: float) -> None:
    """Wait until process 0 answers: torch does too, with a page of stack traces. Raises OSError when it does not."""
    socket.getaddrinfo(*address)
    while rank:
        try:
            socket.create_connection(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _number(environment: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        wanted = f"a whole number from {low} {'on' if high is None else f'to {high}'}"
        raise UserError(f"{name}='{text}' in the environment: {wanted} is needed; {ALONE}")
    return int(text)
