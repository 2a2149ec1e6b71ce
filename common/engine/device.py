"""Where and in which arithmetic a run computes; which process of how many this is."""

import platform
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from backbench.common.base.errors import UserError
from backbench.common.engine.torchrun import join, launch


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`, or a GPU when there is one; under torchrun joins the process group (nccl or gloo).

    From here on fp32 is fp32 on it: matrix products and convolutions are not rounded to TF32 or bf16. Raises UserError
    when the named device is not there, and for what a launcher left in the environment.
    """
    launched = launch()
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; use cpu, cuda or cuda:N") from None
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        index, count = device.index or 0, torch.cuda.device_count()
        index = index if launched.local is None else launched.local
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise UserError(f"--device {name}: not on this machine ({count} GPUs)")
        if index >= count:
            raise UserError(
                f"torchrun: process {index} has no GPU, there are {count}; --nproc-per-node {count}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if launched.world > 1 and not dist.is_initialized():
        join(launched, device)
    return device


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that predicts, scores and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def from_main(value: Any) -> Any:
    """Process 0's value, in every process."""
    if world() == 1:
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` → bf16 where the hardware multiplies it natively, else fp32; any other is itself."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    probes = (getattr(torch.cpu, f"_is_{what}_supported", None) for what in ("avx512_bf16", "amx_tile"))
    return "bf16" if any(probe is not None and probe() for probe in probes) else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """An arithmetic (fp32, bf16 or fp16) as a context: a recipe's `precision`, resolved, or its `eval_precision`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def to_device(value: Any, device: torch.device) -> Any:
    """Move tensors in nested lists, tuples and dicts to `device`, without waiting for the copies."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_device(v, device) for v in value)
    return value


def seed_torch(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` of the generators in use: that one asks every backend for its own, 100 times slower."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` through torch.compile, with eager mode's random numbers and its own names of weights.

    A small function is tried first. Raises UserError when there is nothing to compile with.
    """
    options = {"fallback_random": True}
    try:
        probe = torch.zeros(64, device=device)
        torch.compile(lambda x: (x + 1).sin(), options=options)(probe)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--compile: torch cannot compile for {device.type} here ({reason.strip()[:120]}); "
            "a C++ compiler (and on a GPU triton) is needed; or leave --compile out"
        ) from None
    return torch.compile(model, options=options)


def hardware(device: torch.device) -> dict[str, Any]:
    """Names of what computed: device, threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "processes": world()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return {"device": name, "threads": torch.get_num_threads(), "processes": world()}
