"""How many threads compute."""

import torch

from tenfold import compiled
from tenfold.errors import TenfoldError


def use_threads(count: int | None) -> int:
    """Have torch and the kernels use that many, by default as many as this process may run on.

    Raises TenfoldError for more than there are cores.
    """
    count = count or compiled.default_threads()
    if count > (cores := compiled.cores()):
        raise TenfoldError(f"--threads {count} is more than the {cores} cores that this process may use")
    torch.set_num_threads(count)
    if compiled.available():
        compiled.module().set_threads(count)
    return count
