"""`tenfold unpack`: a packed model made a plain Hugging Face checkpoint again."""

from pathlib import Path

import torch

from tenfold.checkpoint.families import Family
from tenfold.checkpoint.pack.opened import packed_config
from tenfold.checkpoint.pack.tokenizer_files import copy_tokenizer
from tenfold.checkpoint.store import load_model, save_model
from tenfold.errors import TenfoldError
from tenfold.files import new_folder, refuse_existing
from tenfold.hub import resolve
from tenfold.memory import check_fits


def unpack(path_or_id: str | Path, out: Path, dtype: torch.dtype) -> Family:
    """Write what a packed model computes with as a checkpoint of its family, which is returned.

    Takes the memory of the whole model in `dtype`. Raises TenfoldError if it is no packed model, if it does
    not fit the memory, if a weight is beyond `dtype`, or as `save_model` does.
    """
    path = resolve(path_or_id)
    config, _ = packed_config(path / "config.json")
    refuse_existing(out)
    needed = dtype.itemsize * config.num_params()
    check_fits(needed, f"{path} in {dtype}", "unpack it where there is more")
    model = load_model(path, dtype)
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise TenfoldError(
                f"{path}: tensor {name} holds numbers that {dtype} does not: use --dtype float32"
            )
    with new_folder(out) as partial:
        family = save_model(model, partial)
        copy_tokenizer(path, partial)
    return family
