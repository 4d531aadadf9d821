"""Memory: how much there is, how much this process took, and what a plan gives each part of a run."""

import mmap
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_LARGE_PAGE = 2 << 20
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True)
class Budget:
    """What this process may hold, and what to begin with."""

    limit: int | None = None
    """Bytes, of everything; None is what is free, less a margin."""
    warm: Path | None = None
    """A trace (`tenfold trace`) whose most used experts are read first, where not all fit."""
    reserve: int = 0
    """Bytes of `limit` that are others': this process's children, or its parent."""


@dataclass(frozen=True)
class Plan:
    """What a memory budget is spent on; all in bytes but `slots`, `experts`, `batch` and `context`."""

    budget: int
    process: int
    """Of Python, its libraries and the tokenizer: measured before anything of the model is read."""
    weights: int
    """All that every token needs."""
    kv_cache: int
    """For `context` positions of `batch` sequences, or what they share."""
    scratch: int
    """For the arithmetic, and what the system keeps for a process of this size."""
    record: int
    """Of one routed expert."""
    slots: int
    """How many experts are held at once: all, or as many as there is room for."""
    experts: int
    """How many there are, in all layers."""
    batch: int
    context: int
    shared: int | None = None
    """Positions that all sequences share, where not each can be as long as `context`."""

    @property
    def positions(self) -> str:
        """Of the KV cache, for people."""
        return f"{self.batch} x {self.context:,}" if self.shared is None else f"{self.shared:,}"

    @property
    def streams(self) -> bool:
        """Whether some experts stay on disk until they are wanted."""
        return self.slots < self.experts

    def summary(self) -> dict[str, Any]:
        """What `--json` prints of it; the names are stable."""
        return {
            "budget_bytes": self.budget,
            "process_bytes": self.process,
            "always_needed_weight_bytes": self.weights,
            "kv_cache_bytes": self.kv_cache,
            "scratch_bytes": self.scratch,
            "experts_bytes": self.slots * self.record,
            "experts_held": self.slots,
            "experts": self.experts,
            "batch": self.batch,
            "context": self.context,
            "kv_tokens": self.shared,
        }

    def __str__(self) -> str:
        held = f"{self.slots:,} of {self.experts:,} experts" if self.streams else "all experts"
        return (
            f"memory {size(self.budget)}: process {size(self.process)}, weights of every token"
            f" {size(self.weights)}, KV cache {size(self.kv_cache)} ({self.positions} tokens),"
            f" scratch {size(self.scratch)}, {held} {size(self.slots * self.record)}"
        )


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "500 MB" or "1073741824". Raises TenfoldError for anything else, and for none."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?) ?([a-zA-Z]*)", text.strip(), re.ASCII)
    units = {name.lower(): value for name, value in _UNITS.items()}
    if (
        match is None
        or (unit := match[2].lower()) not in units
        or not (found := int(float(match[1]) * units[unit]))
    ):
        raise TenfoldError(f"memory {text!r:.40} is no size: write 8GiB, 500MB, or a number of bytes")
    return found


def size(num_bytes: int) -> str:
    """For people."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def available_bytes() -> int | None:
    """Memory that can be taken without swapping: the least of what the machine has free (Linux's
    MemAvailable) and what its control groups leave this process; None where it is not known."""
    try:
        machine = int(_fields(_PROC / "meminfo")["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([machine, *_left_by_cgroups()])


def _left_by_cgroups() -> Iterator[int]:
    """Of this process's control group and each that it is in, whatever their version: the limit less the use
    that is not files, which are dropped when memory is short."""
    try:
        groups = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root) and (left := _left(folder, limit, used)) is not None:
                yield left


def _left(folder: Path, limit: str, used: str) -> int | None:
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group as seen from here, or "max"
        return None
    files = sum(
        int(stat.get(f"total_{kind}", stat.get(kind, 0))) for kind in ("active_file", "inactive_file")
    )
    return max(0, most - now + files)


def check_fits(needed: int, what: str, instead: str) -> None:
    """Raise TenfoldError if `needed` bytes for `what` are more than there are; `instead` is the way out."""
    there = available_bytes()
    if there is not None and needed > there:
        raise TenfoldError(
            f"{what} needs {needed / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} are free: {instead}"
        )


def resident_bytes() -> int:
    """What this process holds now, mapped files included; or held at most, where that is unknown."""
    return _status("VmRSS") or peak_memory_bytes()


def peak_memory_bytes() -> int:
    """The most memory this process has held at once, files it maps included."""
    # Linux's ru_maxrss begins with what the process held that started this one.
    if (peak := _status("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int | None:
    """Bytes that Linux tells of this process under a name."""
    try:
        return int(_fields(_PROC / "self/status")[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _fields(file: Path) -> dict[str, str]:
    return dict(line.split(":", 1) for line in file.read_text().splitlines())


def large_pages(size: int) -> mmap.mmap:
    """`size` bytes of memory or a little more, zero, in large pages where the system has them."""
    size = -(-size // _LARGE_PAGE) * _LARGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    with suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
