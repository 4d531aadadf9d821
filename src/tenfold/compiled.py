"""The compiled module (csrc/), where this installation has it, and its instruction set. No torch here."""

import os
from types import ModuleType

from tenfold.errors import TenfoldError

_native: ModuleType | None
try:
    from tenfold import _native
except ImportError:
    _native = None

WHY_NOT = (
    "this installation has no native kernels (they need a C++20 compiler when tenfold is installed);"
    " packed models run through torch, from weights in floating point"
)


def available() -> bool:
    return _native is not None


def module() -> ModuleType:
    """The compiled module. Raises TenfoldError where there is none, or TENFOLD_ISA asks for too much."""
    if _native is None:
        raise TenfoldError(WHY_NOT)
    isa()
    return _native


def isa() -> str | None:
    """The instruction set in use: avx512, avx2 or portable; None without native kernels.

    The best this machine has, unless the environment variable TENFOLD_ISA names another. Raises
    TenfoldError where that is unknown or beyond this machine.
    """
    if _native is None:
        return None
    try:
        return str(_native.isa())
    except ValueError as error:
        raise TenfoldError(str(error)) from None


def cores() -> int:
    """That this process may use. More threads than those would wait for each other at every product."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """One a core, or fewer if OMP_NUM_THREADS says so, as in torch."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(wanted), cores()) if wanted.isdecimal() and int(wanted) > 0 else cores()


if _native is not None:
    _native.set_threads(default_threads())
