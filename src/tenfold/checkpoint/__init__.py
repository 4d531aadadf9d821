"""Models as Hugging Face directories (config.json, safetensors, tokenizer.json), and GGUF files.

`load_model` and `save_model` need torch, so they are imported when first asked for; the families
and `load_config` stay usable without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.checkpoint.families import Family, family_of
from tenfold.checkpoint.gguf.architectures import gguf_config
from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.errors import TenfoldError
from tenfold.files import read_json
from tenfold.hub import resolve
from tenfold.switch_config import AnyConfig

if TYPE_CHECKING:
    from tenfold.checkpoint.store import load_decoder_only, load_model, save_model

__all__ = ["load_config", "load_decoder_only", "load_model", "read_config", "read_object", "save_model"]


def load_config(path_or_id: str | Path) -> AnyConfig:
    """The config of a model directory, GGUF file or hub id.

    Raises TenfoldError for anything but a known, valid one.
    """
    path = resolve(path_or_id, "config")
    if path.suffix != ".gguf":
        return read_config(path / "config.json")[1]
    file = open_gguf(path)
    return gguf_config(file.metadata, file.tensors, str(path))


def read_config(path: Path) -> tuple[Family, AnyConfig]:
    """A config.json, with the family it was written as."""
    raw = read_object(path)
    family = family_of(raw, str(path))
    return family, family.from_hf(raw, str(path))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a TenfoldError that names the file."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise TenfoldError(f"{path}: expected a JSON object, not {type(raw).__name__}")
    return raw


def __getattr__(name: str) -> Any:
    if name in ("load_decoder_only", "load_model", "save_model"):
        from tenfold.checkpoint import store

        return getattr(store, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
