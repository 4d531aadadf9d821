"""A model's tokenizer, handed on as it is."""

import shutil
from pathlib import Path

from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.hub import TOKENIZER_FILES
from tenfold.tokenizer import load_tokenizer


def copy_tokenizer(model: Path, directory: Path) -> None:
    """The tokenizer files, if any, of a model's directory; of a GGUF file, what its keys say."""
    if model.is_file():
        if "tokenizer.ggml.model" in open_gguf(model).metadata:
            load_tokenizer(model).save(directory)
        return
    for pattern in TOKENIZER_FILES:
        for file in model.glob(pattern):
            copy = directory / file.relative_to(model)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
