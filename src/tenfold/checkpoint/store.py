"""Loading and saving whole models. Each tensor is filled exactly once; a save is all or nothing."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tenfold.checkpoint import read_config, safetensors
from tenfold.checkpoint.families import Family, family_for
from tenfold.checkpoint.gguf.architectures import gguf_config
from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.checkpoint.gguf.slots import READ_BY_CONFIG, gguf_slots
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.checkpoint.stored import Stored
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.files import new_folder, write_json
from tenfold.model.transformer import Transformer

MAX_PARAMS = 1 << 60


class Checkpoint(NamedTuple):
    """A model on disk, none of its weights read yet."""

    config: ModelConfig
    slots: SlotMap
    tensors: dict[str, Stored]
    source: str
    """What calls for those slots, in words."""


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The model in a directory or a GGUF file, in eval mode. Router biases stay float32 whatever
    `dtype` is.

    Raises TenfoldError naming the file and tensor for anything missing, left over or misshapen.
    """
    path = Path(path)
    checkpoint = _open_gguf(path) if path.suffix == ".gguf" else _open_directory(path)
    _check_names(checkpoint)
    model = _unallocated(checkpoint)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:  # to_empty allocates a shared parameter twice
        model.lm_head.weight = model.embed_tokens.weight
    _fill(model, checkpoint)
    return model.eval()


def _open_directory(directory: Path) -> Checkpoint:
    family, config = read_config(directory / "config.json")
    tensors = safetensors.list_tensors(directory)
    config = family.present(config, tensors)
    slots = family.tensor_map(config)
    for name in set(tensors) - set(slots):
        if family.is_redundant(config, name):
            del tensors[name]
    return Checkpoint(config, slots, tensors, f"the {family.architecture} of {directory / 'config.json'}")


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)
    config = gguf_config(file.metadata, file.tensors, str(path))
    tensors = {name: stored for name, stored in file.tensors.items() if name not in READ_BY_CONFIG}
    architecture = file.metadata["general.architecture"]
    return Checkpoint(config, gguf_slots(config, tensors), tensors, f"the {architecture} of {path}")


def _check_names(checkpoint: Checkpoint) -> None:
    for name, slot in checkpoint.slots.items():
        if name not in checkpoint.tensors and not slot.is_copy:
            raise TenfoldError(f"tensor {name} is missing, which {checkpoint.source} calls for")
    for name, stored in checkpoint.tensors.items():
        if name not in checkpoint.slots:
            raise TenfoldError(f"{stored.file}: tensor {name} has no place in {checkpoint.source}")


def _unallocated(checkpoint: Checkpoint) -> Transformer:
    """On the meta device, which spares a random initialization and lets all shapes be checked before
    a config that claims more than there is can ask for the memory."""
    count = checkpoint.config.num_params()
    if count > MAX_PARAMS:
        raise TenfoldError(f"{checkpoint.source} has {count:,} parameters, more than any machine can hold")
    with torch.device("meta"):
        model = Transformer(checkpoint.config)
    ours = _own_tensors(model)
    for name, stored in checkpoint.tensors.items():
        slot = checkpoint.slots[name]
        shape = slot.shape(slot.view(ours[slot.name]))
        if stored.shape != shape and not slot.is_copy:
            raise TenfoldError(
                f"{stored.file}: tensor {name} has shape {stored.shape}, not {shape} as its config says"
            )
    return model


def _fill(model: Transformer, checkpoint: Checkpoint) -> None:
    ours = _own_tensors(model)
    filled: Counter[str] = Counter()
    for name, stored in checkpoint.tensors.items():
        slot = checkpoint.slots[name]
        if not slot.is_copy:
            target = slot.view(ours[slot.name])
            _copy(stored, slot, target)
            filled[slot.name] += target.numel()
    for name, whole in ours.items():
        if filled[name] != whole.numel():
            raise AssertionError(f"the slots of this family do not fill {name} exactly once")


def _copy(stored: Stored, slot: Slot, target: Tensor) -> None:
    """Into a view of the model's tensor, a few rows at a time where the file has the same first axis."""
    if slot.merged == 0:
        target.copy_(stored.whole().view(target.shape))
        return
    for rows, piece in stored.pieces():
        target[rows].copy_(piece.view(target[rows].shape))


def _own_tensors(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers by name, a tied head left out."""
    tensors: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def save_model(
    model: Transformer,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = safetensors.MAX_SHARD_BYTES,
) -> Family:
    """Write a Hugging Face directory, whole or not at all, and return the family it was saved as.

    Parameters are written as `dtype` (by default as they are), router biases always as float32.
    Raises TenfoldError if the directory is there and not empty, or cannot be written.
    """
    directory = Path(directory)
    family = family_for(model.config)
    dtype = dtype or model.embed_tokens.weight.dtype
    if dtype not in safetensors.DTYPES:
        raise TenfoldError(f"cannot save as {dtype}, only {', '.join(map(str, safetensors.DTYPES))}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TenfoldError(f"{directory} is there already and is not an empty directory")
    with new_folder(directory) as partial:
        raw = {**family.to_hf(model.config), "dtype": str(dtype).removeprefix("torch.")}
        write_json(partial / "config.json", raw)
        if tokenizer is not None:
            _write_tokenizer(partial, tokenizer, model.config)
        safetensors.write_tensors(partial, _entries(model, family, dtype), max_shard_bytes)
    return family


def _entries(model: Transformer, family: Family, dtype: torch.dtype) -> Iterator[safetensors.Entry]:
    tensors = _own_tensors(model)
    buffers = dict(model.named_buffers())
    for name, slot in family.tensor_map(model.config).items():
        view = slot.view(tensors[slot.name])
        saved_as = torch.float32 if slot.name in buffers else dtype
        yield safetensors.Entry(name, view, slot.shape(view), saved_as)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Files from which transformers.AutoTokenizer makes the same tokenizer."""
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise TenfoldError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, more than the model's"
            f" vocab_size {config.vocab_size}"
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if config.eos_token_ids:
        eos = tokenizer.id_to_token(config.eos_token_ids[0])
        if eos is None:
            raise TenfoldError(f"the tokenizer has no token of eos_token_id {config.eos_token_ids[0]}")
        settings["eos_token"] = eos
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(directory / "tokenizer_config.json", settings)
