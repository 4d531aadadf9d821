"""Where to compute, and in what precision."""

from contextlib import AbstractContextManager

import torch

from tenfold.errors import TenfoldError


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
