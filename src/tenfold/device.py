"""Where to compute, and in what precision."""

import time
from contextlib import AbstractContextManager

import torch

from tenfold.errors import TenfoldError


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError):
        raise TenfoldError(f"device: {name} is not on this machine; use cpu or auto") from None
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """`name`, or for "auto" whichever of bfloat16 and float32 multiplies matrices faster here."""
    if name != "auto":
        return name
    return min(("bfloat16", "float32"), key=lambda dtype: _matmul_seconds(dtype, device))


def _matmul_seconds(dtype: str, device: torch.device) -> float:
    matrix = torch.ones(512, 512, dtype=getattr(torch, dtype), device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = min(best, time.perf_counter() - start)
    return best


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where `precision` says so; everything else stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
