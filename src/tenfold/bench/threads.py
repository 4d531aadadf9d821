"""How many threads compute."""

import torch

from tenfold import compiled


def use_threads(count: int | None) -> int:
    """Have torch and the kernels use that many, by default as many as this process may run on."""
    count = count or compiled.default_threads()
    torch.set_num_threads(count)
    if compiled.available():
        compiled.module().set_threads(count)
    return count
