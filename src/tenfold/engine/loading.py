"""What runs: a packed model where the compiled kernels are, any other checkpoint as torch's."""

from pathlib import Path

from tenfold import compiled
from tenfold.checkpoint import load_model, read_object
from tenfold.checkpoint.store import Model
from tenfold.errors import TenfoldError
from tenfold.formats import packing_of
from tenfold.hub import resolve
from tenfold.packed import PackedModel, load_packed
from tenfold.tokenizer import Tokenizer, load_tokenizer

AnyModel = Model | PackedModel


def runs_packed(path: Path) -> bool:
    """Whether a path is a packed model, and this installation has the kernels to run it as it is."""
    config_json = path / "config.json"
    is_packed = config_json.is_file() and packing_of(read_object(config_json), str(config_json)) is not None
    return is_packed and compiled.available()


def load_model_and_tokenizer(path_or_id: str | Path) -> tuple[AnyModel, Tokenizer]:
    """The model and the tokenizer of a directory, a .gguf file or a hub id."""
    path = resolve(path_or_id)
    model: AnyModel = load_packed(path) if runs_packed(path) else load_model(path)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise TenfoldError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's"
            f" vocab_size {model.config.vocab_size}"
        )
    return model, tokenizer
