"""The most this machine does: memory and disk read, and products of each kind."""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold import compiled
from tenfold.files import writing
from tenfold.memory import available_bytes, large_pages

READ_BYTES = 1 << 30
"""Of memory: many times any cache."""
DISK_BYTES = 1 << 28
CHUNK = 4 << 20
DISK_READERS = 4
ROUNDS = 7
PRODUCT = 2048
"""Rows and columns of the matrices whose product stands for torch's peak."""
KINDS = {"int8_ops_per_second": "int8", "bf16_flops_per_second": "bf16", "fp32_flops_per_second": "fp32"}


def measure(threads: int, file: Path | None) -> dict[str, Any]:
    """Bytes a second read by `threads` threads, and operations a second (a multiply-add is two).

    Products are those of the instruction set that the kernels use; without the native module, torch's
    matrix products stand for the peaks. The disk is read from `file`, or from a temporary one.
    A figure that this machine cannot give is None: bf16 products where there are none, the disk where
    the system keeps its cache.
    """
    size = min(READ_BYTES, (available_bytes() or READ_BYTES) // 4)
    isa = compiled.isa()
    if compiled.available():
        module = compiled.module()
        buffer = torch.frombuffer(large_pages(size), dtype=torch.uint8)[:size].fill_(1)
        read = _best(lambda buffer: module.read_seconds(threads, buffer.data_ptr(), size), buffer) * size
        peaks = {name: module.peak(kind, isa, threads) or None for name, kind in KINDS.items()}
    else:
        read = _best(lambda buffer: buffer.sum(), torch.ones(size // 8, dtype=torch.long)) * size
        peaks = {name: _torch_peak(kind) for name, kind in KINDS.items()}
    disk = {"disk_read_bytes_per_second": _disk_read(file)}
    return {"isa": isa, "read_bandwidth_bytes_per_second": read, **peaks, **disk}


def _best(work: Any, *arguments: Tensor) -> float:
    """How often a second, the best of ROUNDS."""
    best = 0.0
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work(*arguments)
        best = max(best, 1 / (time.perf_counter() - start))
    return best


def _torch_peak(kind: str) -> float:
    dtype = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}[kind]
    square = torch.ones(PRODUCT, PRODUCT).to(dtype)
    multiply = torch._int_mm if kind == "int8" else torch.mm
    return _best(multiply, square, square) * 2 * PRODUCT**3


def _disk_read(file: Path | None) -> float | None:
    """Bytes a second from the disk of `file`, without the system's cache."""
    if not hasattr(os, "posix_fadvise"):
        return None
    if file is not None:
        return _uncached_read(file)
    folder = Path(tempfile.gettempdir())
    with writing(folder), tempfile.NamedTemporaryFile(dir=folder, prefix="tenfold-bench-") as temporary:
        chunk = os.urandom(CHUNK)  # compressing file systems must have something to read
        for _ in range(DISK_BYTES // CHUNK):
            temporary.write(chunk)
        temporary.flush()
        os.fsync(temporary.fileno())
        return _uncached_read(Path(temporary.name))


def _uncached_read(file: Path) -> float:
    """Several reads at a time, as a fast disk wants them."""
    size = min(file.stat().st_size, DISK_BYTES)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        with ThreadPoolExecutor(DISK_READERS) as readers:
            start = time.perf_counter()
            parts = readers.map(lambda at: len(os.pread(descriptor, CHUNK, at)), range(0, size, CHUNK))
            return sum(parts) / (time.perf_counter() - start)
    finally:
        os.close(descriptor)
