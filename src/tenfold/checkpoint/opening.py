"""A model on disk, found and described but not read: what `load_model` fills a model from."""

from pathlib import Path
from typing import NamedTuple

from tenfold.checkpoint import read_config, read_object, weights
from tenfold.checkpoint.gguf.architectures import gguf_config
from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.checkpoint.gguf.slots import READ_BY_CONFIG, gguf_slots
from tenfold.checkpoint.pack.stored import packed_slots
from tenfold.checkpoint.slot import SlotMap
from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError
from tenfold.formats import packing_of
from tenfold.switch_config import AnyConfig


class Checkpoint(NamedTuple):
    """A model on disk, none of its weights read yet: every tensor has a slot, every slot its tensor."""

    config: AnyConfig
    slots: SlotMap
    tensors: dict[str, Stored]
    source: str
    """What calls for those slots, in words."""


def open_checkpoint(path: Path) -> Checkpoint:
    """A directory or a GGUF file. Raises TenfoldError naming a tensor that is missing or left over."""
    checkpoint = _open_gguf(path) if path.suffix == ".gguf" else _open_directory(path)
    for name, slot in checkpoint.slots.items():
        if name not in checkpoint.tensors and not slot.is_copy:
            raise TenfoldError(f"tensor {name} is missing, which {checkpoint.source} calls for")
    for name, stored in checkpoint.tensors.items():
        if name not in checkpoint.slots:
            raise TenfoldError(f"{stored.file}: tensor {name} has no place in {checkpoint.source}")
    return checkpoint


def _open_directory(directory: Path) -> Checkpoint:
    config_json = directory / "config.json"
    family, config = read_config(config_json)
    tensors = weights.list_tensors(directory)
    if packing_of(read_object(config_json), str(config_json)):
        return Checkpoint(config, packed_slots(config_json), tensors, f"the packed model of {config_json}")
    config = family.present(config, tensors)
    slots = family.tensor_map(config)
    names = set(tensors)
    for name in names - set(slots):
        # transformers writes shared experts of width zero
        if family.is_redundant(config, name, names) or 0 in tensors[name].shape:
            del tensors[name]
    return Checkpoint(config, slots, tensors, f"the {family.architecture} of {config_json}")


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    config = gguf_config(file.metadata, file.tensors, str(path))
    tensors = {name: stored for name, stored in file.tensors.items() if name not in READ_BY_CONFIG}
    architecture = file.metadata["general.architecture"]
    return Checkpoint(config, gguf_slots(config, tensors), tensors, f"the {architecture} of {path}")
