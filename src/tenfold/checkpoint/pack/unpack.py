"""`tenfold unpack`: a packed model made a plain Hugging Face checkpoint again."""

from pathlib import Path

import torch

from tenfold.checkpoint.families import Family
from tenfold.checkpoint.pack.opened import packed_config
from tenfold.checkpoint.pack.tokenizer_files import copy_tokenizer
from tenfold.checkpoint.store import load_model, save_model
from tenfold.files import new_folder, refuse_existing
from tenfold.hub import resolve


def unpack(path_or_id: str | Path, out: Path, dtype: torch.dtype) -> Family:
    """Write what a packed model computes with as a checkpoint of its family, which is returned.

    Takes the memory of the whole model in `dtype`. Raises TenfoldError if it is no packed model, or as
    `save_model` does.
    """
    path = resolve(path_or_id)
    packed_config(path / "config.json")
    refuse_existing(out)
    model = load_model(path, dtype)
    with new_folder(out) as partial:
        family = save_model(model, partial)
        copy_tokenizer(path, partial)
    return family
