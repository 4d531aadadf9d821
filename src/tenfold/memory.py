"""How much memory there is, and how much this process took."""

import resource
import sys
from pathlib import Path

from tenfold.errors import TenfoldError

_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Memory that can be taken without swapping (Linux: MemAvailable); None where it is not known."""
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def check_fits(needed: int, what: str, instead: str) -> None:
    """Raise TenfoldError if `needed` bytes for `what` are more than there are; `instead` is the way out."""
    there = available_bytes()
    if there is not None and needed > there:
        raise TenfoldError(
            f"{what} needs {needed / 2**30:.1f} GiB of memory, and {there / 2**30:.1f} are free: {instead}"
        )


def peak_memory_bytes() -> int:
    """The most memory this process has held at once, files it maps included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
