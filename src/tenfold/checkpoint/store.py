"""Loading and saving whole models. Each tensor is filled exactly once; a save is all or nothing."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tenfold.checkpoint import load_config, safetensors
from tenfold.checkpoint.families import Family, family_for
from tenfold.checkpoint.opening import Checkpoint, open_checkpoint
from tenfold.checkpoint.quantized import FLOATS
from tenfold.checkpoint.slot import Slot
from tenfold.checkpoint.stored import Stored
from tenfold.config import ModelConfig
from tenfold.device import pick_device
from tenfold.errors import TenfoldError
from tenfold.files import new_folder, refuse_existing, write_json
from tenfold.hub import resolve
from tenfold.model.switch import SwitchTransformer
from tenfold.model.transformer import Transformer
from tenfold.switch_config import AnyConfig, SwitchConfig, decoder_only
from tenfold.tokenizer import Tokenizer

Model = Transformer | SwitchTransformer
MAX_PARAMS = 1 << 60


def load_model(
    path_or_id: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Model:
    """The model in a directory, a GGUF file or of a hub id, in eval mode.

    Router biases stay float32 whatever `dtype` is. Raises TenfoldError naming the file and tensor for
    anything missing, left over or misshapen.
    """
    if dtype not in FLOATS:
        raise TenfoldError(f"cannot load as {dtype}, only {', '.join(map(str, FLOATS))}")
    device = pick_device(str(device))
    checkpoint = open_checkpoint(resolve(path_or_id))
    model = unallocated(checkpoint)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    # As to_empty does, whose empty_like imports 50 MB of compiler for tensors on the meta device.
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))  # type: ignore[no-untyped-call]
    model.tie_weights()  # which are two now
    _fill(model, checkpoint)
    return model.eval()


def load_decoder_only(path: str | Path) -> Transformer:
    """The model that `load_model` loads, for what works on no encoder-decoder: one is a TenfoldError."""
    decoder_only(load_config(path), str(path))
    model = load_model(path)
    assert isinstance(model, Transformer)
    return model


def new_model(config: AnyConfig) -> Model:
    return SwitchTransformer(config) if isinstance(config, SwitchConfig) else Transformer(config)


def unallocated(checkpoint: Checkpoint) -> Model:
    """On the meta device, which spares a random initialization and lets all shapes be checked before
    a config that claims more than there is can ask for the memory."""
    count = checkpoint.config.num_params()
    if count > MAX_PARAMS:
        raise TenfoldError(f"{checkpoint.source} has {count:,} parameters, more than any machine can hold")
    with torch.device("meta"):
        model = new_model(checkpoint.config)
    ours = own_tensors(model)
    for name, stored in checkpoint.tensors.items():
        slot = checkpoint.slots[name]
        shape = slot.shape(slot.view(ours[slot.name]))
        if stored.shape != shape and not slot.is_copy:
            raise TenfoldError(
                f"{stored.file}: tensor {name} has shape {stored.shape}, not {shape} as its config says"
            )
    return model


def _fill(model: Model, checkpoint: Checkpoint) -> None:
    ours = own_tensors(model)
    filled: Counter[str] = Counter()
    for name, stored in checkpoint.tensors.items():
        slot = checkpoint.slots[name]
        if not slot.is_copy:
            target = slot.view(ours[slot.name])
            copy(stored, slot, target)
            filled[slot.name] += target.numel()
    for name, whole in ours.items():
        if filled[name] != whole.numel():
            raise AssertionError(f"the slots of this family do not fill {name} exactly once")


def copy(stored: Stored, slot: Slot, target: Tensor) -> None:
    """Into a view of the model's tensor, a few rows at a time where the file has the same first axis."""
    if slot.merged == 0:
        target.copy_(stored.whole().view(target.shape))
        return
    for rows, piece in stored.pieces():
        target[rows].copy_(piece.view(target[rows].shape))


def own_tensors(model: Model) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that share a tensor once."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


def save_model(
    model: Model,
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
    dtype = dtype or model.lm_head.weight.dtype
    if dtype not in safetensors.DTYPES:
        raise TenfoldError(f"cannot save as {dtype}, only {', '.join(map(str, safetensors.DTYPES))}")
    refuse_existing(directory)
    with new_folder(directory) as partial:
        raw = {**family.to_hf(model.config), "dtype": str(dtype).removeprefix("torch.")}
        write_json(partial / "config.json", raw)
        if tokenizer is not None:
            _write_tokenizer(partial, tokenizer, model.config)
        safetensors.write_tensors(partial, _entries(model, family, dtype), max_shard_bytes)
    return family


def _entries(model: Model, family: Family, dtype: torch.dtype) -> Iterator[safetensors.Entry]:
    tensors = own_tensors(model)
    buffers = dict(model.named_buffers())
    for name, slot in family.tensor_map(model.config).items():
        view = slot.view(tensors[slot.name])
        saved_as = torch.float32 if slot.name in buffers else dtype
        yield safetensors.Entry(name, view, slot.shape(view), saved_as)


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, config: AnyConfig) -> None:
    """Files from which transformers.AutoTokenizer makes the same tokenizer."""
    if tokenizer.vocab_size > config.vocab_size:
        raise TenfoldError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's"
            f" vocab_size {config.vocab_size}"
        )
    settings: dict[str, Any] = {}
    if isinstance(config, ModelConfig):
        settings["model_max_length"] = config.max_position_embeddings
    if config.eos_token_ids:
        eos = tokenizer.raw.id_to_token(config.eos_token_ids[0])
        if eos is None:
            raise TenfoldError(f"the tokenizer has no token of eos_token_id {config.eos_token_ids[0]}")
        settings["eos_token"] = eos
    tokenizer.save(directory, **settings)
