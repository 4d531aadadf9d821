"""What runs: a packed model where the compiled kernels are, any other checkpoint as torch's."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tenfold import compiled
from tenfold.chat_template import TEMPLATE_BYTES
from tenfold.checkpoint import load_config, load_model, read_object
from tenfold.checkpoint.pack.opened import packed_config
from tenfold.checkpoint.store import Model, load_decoder_only
from tenfold.engine.batch import BatchRunner
from tenfold.engine.budget import Room, always_bytes, default_budget, plan_memory
from tenfold.engine.packed_batch import BLOCK_SIZE, PackedBatchRunner
from tenfold.engine.torch_batch import TorchBatchRunner
from tenfold.errors import TenfoldError
from tenfold.formats import packing_of
from tenfold.hub import resolve
from tenfold.memory import Budget, check_fits, resident_bytes
from tenfold.packed import PackedModel, load_packed, read_packed
from tenfold.switch_config import decoder_only
from tenfold.tokenizer import Tokenizer, load_tokenizer
from tenfold.trace import file as trace

AnyModel = Model | PackedModel
ANY = Budget()
USUAL_CONTEXT = 4096
"""Positions to plan for where nobody says how many, if the model's context is not shorter."""
KV_SHARE = 1 / 4
"""Of the memory that weights leave which every token needs, at most, for the KV cache of many sequences where
nobody says how large it is to be."""
PROMPT_TOKENS = 512
"""Of prompts, in one pass, beside the token that each other sequence decodes."""


def runs_packed(path: Path) -> bool:
    """Whether a path is a packed model, and this installation has the kernels to run it as it is."""
    config_json = path / "config.json"
    is_packed = config_json.is_file() and packing_of(read_object(config_json), str(config_json)) is not None
    return is_packed and compiled.available()


def load_packed_within(directory: Path, memory: Budget, room: Room) -> PackedModel:
    """A packed model that runs within a budget, with as many of its experts as fit, each checked when it is
    read. Where nobody names a budget, one that fits is mapped, which reads nothing beforehand.

    All it is run with must be imported, and the tokenizer loaded: what the process holds now counts. `room`
    is cut to the model's context. Raises TenfoldError for a budget that is too small, before any weight is
    read, and for a trace of another model.
    """
    config, parts = packed_config(directory / "config.json")
    room = room._replace(context=min(room.context, config.max_position_embeddings))
    hottest = trace.hottest(memory.warm, config) if memory.warm else []
    plan = plan_memory(config, parts, memory.limit, room, memory.reserve)
    if memory.limit is None and not plan.streams:
        return load_packed(directory)
    model = replace(read_packed(directory, plan.slots), plan=plan)
    if model.store:
        every = ((layer, e) for layer in config.sparse_layers for e in range(config.num_experts))
        model.store.warm(hottest if plan.streams else every)
    return model


def load_model_for(tokenizer: Tokenizer, path: Path, memory: Budget, context: int) -> AnyModel:
    """The model of a directory or a .gguf file, for one sequence of `context` tokens of its tokenizer.

    Raises TenfoldError as `load_packed_within` does, and for a budget or a trace if it is not packed.
    """
    if runs_packed(path):
        model: AnyModel = load_packed_within(path, memory, Room(1, context))
    else:
        _check_no_budget(path, memory)
        model = load_model(path)
    _check_tokens(tokenizer, model.config.vocab_size, path)
    return model


def _check_tokens(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise TenfoldError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's"
            f" vocab_size {vocab_size}"
        )


def _check_no_budget(path: Path, memory: Budget) -> None:
    if memory.limit is not None or memory.warm is not None:
        option = "--warm" if memory.limit is None else "--memory"
        raise TenfoldError(f"{option}: {path} {no_budget(path)}")


def no_budget(path: Path) -> str:
    """Why a model that does not run packed cannot be kept to a budget."""
    if (path / "config.json").is_file() and not compiled.available():
        return f"cannot be kept to a budget here: {compiled.WHY_NOT}"
    return "is not packed, and only a packed model runs within a budget: `tenfold pack` makes one"


def load_model_and_tokenizer(
    path_or_id: str | Path, memory: Budget = ANY, context: int = USUAL_CONTEXT
) -> tuple[AnyModel, Tokenizer]:
    """The model, as `load_model_for` loads it, and the tokenizer of a directory, .gguf file or hub id."""
    path = resolve(path_or_id)
    tokenizer = load_tokenizer(path)
    return load_model_for(tokenizer, path, memory, context), tokenizer


class Opened(NamedTuple):
    """What many sequences run on together."""

    runner: BatchRunner
    tokenizer: Tokenizer
    path: Path
    memory_bytes: int | None
    """The budget it is kept to, if any."""


def open_batch_runner(
    path_or_id: str | Path, memory: Budget, context: int, max_sequences: int, kv_tokens: int | None = None
) -> Opened:
    """Any decoder-only model, with a KV cache of `kv_tokens` positions that up to `max_sequences` share.

    `context` is cut to the model's. By default there is room for all sequences to be that long, or for as
    many positions as KV_SHARE says, but for one sequence at least. Raises TenfoldError as `load_model_for`
    does, and for a cache that could never fit the memory, or holds less than one sequence.
    """
    path = resolve(path_or_id)
    tokenizer, config = load_tokenizer(path), decoder_only(load_config(path), str(path))
    context = min(context, config.max_position_embeddings)
    packed, every = runs_packed(path), max_sequences * context
    # In bf16 where it is packed, but a latent is there twice, as key and as value.
    of_one = config.kv_bytes_per_token("bfloat16" if packed and not config.is_latent else "float32")
    if kv_tokens is None:
        weights = always_bytes(*packed_config(path / "config.json")) if packed else 4 * config.num_params()
        kv_tokens = max(context, min(every, _kv_bytes(memory, weights) // of_one))
    if kv_tokens < context:
        raise TenfoldError(f"a KV cache of {kv_tokens:,} tokens is less than the context of {context:,}")
    _check_tokens(tokenizer, config.vocab_size, path)
    check_fits(
        kv_tokens * of_one,
        f"a KV cache for {kv_tokens:,} tokens",
        "ask for fewer of them",
    )
    blocks, pass_tokens = -(-kv_tokens // BLOCK_SIZE), PROMPT_TOKENS + max_sequences
    if not packed:
        _check_no_budget(path, memory)
        runner: BatchRunner = TorchBatchRunner(load_decoder_only(path), blocks, BLOCK_SIZE, pass_tokens)
        return Opened(runner, tokenizer, path, None)
    if tokenizer.chat_template is not None:
        memory = replace(memory, reserve=memory.reserve + TEMPLATE_BYTES)
    room = Room(max_sequences, context, kv_tokens, pass_tokens)
    model = load_packed_within(path, memory, room)
    runner = PackedBatchRunner(model, blocks, pass_tokens, context)
    return Opened(runner, tokenizer, path, model.plan.budget if model.plan else None)


def _kv_bytes(memory: Budget, weights: int) -> int:
    """By default, beside `weights` bytes of what every token needs."""
    process = resident_bytes() + memory.reserve
    limit = default_budget(process) if memory.limit is None else memory.limit
    return int(max(0, limit - process - weights) * KV_SHARE)
