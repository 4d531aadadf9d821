"""Where to compute, and in what precision."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from tenfold.errors import TenfoldError

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise TenfoldError(f"device: {name} is not on this machine; use cpu or auto") from None
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """`name`, or for "auto" bfloat16 where the hardware multiplies it and float32 elsewhere.

    Asked of the hardware rather than timed: a resumed run must get the same answer.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if native else "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where `precision` says so; everything else stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For work that has threads of its own: torch's keep a core busy for a while after each operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Have glibc keep what tensors free instead of returning it to the system after every step.

    Otherwise each step maps the same megabytes anew, page by page: a sixth of the CPU time of
    the demo's training steps (LOG.md). Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)
