"""What --device means, and what differs from one kind of device to the next.

MPS, Apple's GPUs, has no float64 and counts its memory in other words.  None of this has run on a Mac:
a test follows every step and looks for float64 on the device.
"""

import os
import sys
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from toy.files import UserError

WITHOUT_FLOAT64 = {"mps"}
TORCHRUN = "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"
THEIRS = "ACCELERATE_", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"  # how these begin


def processes() -> int:
    """How many torchrun has started, this one among them.  UserError for half of its variables.  What else
    accelerate would follow, MPI's too, is named and taken away."""
    if theirs := sorted(name for name in os.environ if name.startswith(THEIRS)):
        print(f"ignored, what decides is here: {', '.join(theirs)}", file=sys.stderr)
        for name in theirs:
            del os.environ[name]
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    rank, several = found.get("RANK", "0"), found.get("WORLD_SIZE", "1")
    numbers = all(value.isdecimal() for name, value in found.items() if name != "MASTER_ADDR")
    whole = all(map(found.get, TORCHRUN)) and numbers and int(rank) < int(several)
    if not whole and ("LOCAL_RANK" in found or several != "1"):
        raise UserError(f"of torchrun's variables there are {found}: unset them, or start with torchrun")
    return int(several)


def find_device(wanted: str) -> str:
    """--device -> "cuda", "mps" or "cpu".  auto: the first of these that is here.  Raises UserError.

    MPS is one device, and knows no collective operations: several processes do not get it.
    """
    several = processes() > 1
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(kind for kind in here if here[kind] and not (several and kind == "mps"))
    if not here[wanted]:
        raise UserError(f"--device {wanted}: no {wanted.upper()} device here")
    if several and wanted == "mps":
        raise UserError("--device mps is for one process; several take cuda or cpu")
    return wanted


def slow_in_bf16(kind: str) -> bool:
    """Whether "cpu" here lacks what makes bf16 fast: without AVX-512, convolutions are five times slower."""
    return kind == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def finest(device: str | torch.device) -> torch.dtype:
    """The most exact type of the device: float64, or float32 where there is no other."""
    return torch.float32 if torch.device(device).type in WITHOUT_FLOAT64 else torch.float64


def exact(tensor: Tensor) -> Tensor:
    """In float64, on its device or, if that has none, on the CPU."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FLOAT64 else tensor).double()


class Single(TorchFunctionMode):
    """Inside, networks that name no type are born in float32, whatever the default."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn) and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        return func(*args, **kwargs)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_memory(device: Any) -> int:
    """Bytes: of the GPU, or of the process.  MPS knows no peak: what is held now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device: Any) -> float:
    """Bytes that there are for everything."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total
