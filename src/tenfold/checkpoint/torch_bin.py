"""pytorch_model.bin files: pickles, of which nothing is run.

Their tensors are mapped, not read: pages of the file that a read has touched count as ours until the
model is loaded, though the system may drop them at any time.
"""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import NoReturn

import torch
from torch import Tensor

from tenfold.checkpoint.raw import RawTensor
from tenfold.errors import TenfoldError

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def list_file(path: Path) -> dict[str, RawTensor]:
    """Every tensor of a file that torch.save wrote.

    Raises TenfoldError for a file that holds anything else, or that is of the format before torch 1.6.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        _refuse(path, "it holds more than tensors, which could only be read by running code from it")
    except Exception as error:  # the unpickler meets bad bytes with whatever its steps raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _refuse(path, f"torch cannot read it ({reason:.200})")
    if not isinstance(contents, dict):
        _refuse(path, f"it holds a {type(contents).__name__}, not tensors by name")
    return {name: _raw(path, name, tensor) for name, tensor in contents.items()}


def _raw(path: Path, name: object, tensor: object) -> RawTensor:
    if not isinstance(name, str) or not name.isprintable():
        _refuse(path, f"a tensor's name is {name!r:.50}")
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        _refuse(path, f"{name} in it is no plain tensor")
    if tensor.is_quantized or tensor.is_meta:
        _refuse(path, f"{name} in it is no plain tensor")
    return RawTensor(name, path, tensor.dtype, tuple(tensor.shape), _reader(tensor.detach()))


def _reader(tensor: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: (tensor[start:stop] if tensor.ndim else tensor).clone()


def _refuse(path: Path, problem: str) -> NoReturn:
    raise TenfoldError(f"{path}: {problem}; convert it to safetensors where you trust it")
