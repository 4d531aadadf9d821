"""How many threads compute."""

import os

import torch

from tenfold.kernels import native


def use_threads(count: int | None) -> int:
    """Have torch and the kernels use that many, by default as many as this process may run on."""
    if count is None:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(count)
    if native.available():
        from tenfold import _native

        _native.set_threads(count)
    return count
