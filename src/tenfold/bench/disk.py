"""How fast the disk delivers pieces of a model's files, here and there, past the system's cache."""

import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tenfold.memory import large_pages

READERS = 4
LARGEST = 4 << 20
"""Bytes read at once; more than that a disk does not notice."""
BUFFERS_BYTES = READERS * LARGEST
ALIGNMENT = 4096


def random_read_speed(files: Sequence[Path], piece: int, seconds: float, seed: int) -> float:
    """Bytes a second of reads of `piece` bytes, at most LARGEST, at random places, READERS at a time."""
    piece = max(ALIGNMENT, min(piece, LARGEST) // ALIGNMENT * ALIGNMENT)
    large = [file for file in files if file.stat().st_size >= piece] or list(files)
    opened = [_open(file) for file in large]
    try:
        start = time.perf_counter()
        with ThreadPoolExecutor(READERS) as readers:
            jobs = [
                readers.submit(_read_until, opened, piece, start + seconds, random.Random(seed * READERS + n))
                for n in range(READERS)
            ]
            return sum(job.result() for job in jobs) / (time.perf_counter() - start)
    finally:
        for descriptor, _ in opened:
            os.close(descriptor)


def _open(file: Path) -> tuple[int, bool]:
    """And whether reads go past the system's cache."""
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0)), hasattr(os, "O_DIRECT")
    except OSError:  # a file system that only reads through its cache
        return os.open(file, os.O_RDONLY), False


def _read_until(opened: Sequence[tuple[int, bool]], piece: int, end: float, dice: random.Random) -> int:
    """Bytes read; at least one piece."""
    total = 0
    # Direct reads want whole pages, and in large ones they are more than twice as fast (LOG.md).
    with large_pages(piece) as buffer, memoryview(buffer)[:piece] as view:
        while not total or time.perf_counter() < end:
            descriptor, direct = dice.choice(opened)
            places = max(1, (os.fstat(descriptor).st_size - piece) // ALIGNMENT + 1)
            at = dice.randrange(places) * ALIGNMENT
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, at, piece, os.POSIX_FADV_DONTNEED)
            total += os.preadv(descriptor, [view], at)
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, at, piece, os.POSIX_FADV_DONTNEED)
    return total
