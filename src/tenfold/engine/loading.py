"""What runs: a packed model where the compiled kernels are, any other checkpoint as torch's."""

from dataclasses import replace
from pathlib import Path

from tenfold import compiled
from tenfold.checkpoint import load_model, read_object
from tenfold.checkpoint.pack.opened import packed_config
from tenfold.checkpoint.store import Model
from tenfold.engine.budget import Room, plan_memory
from tenfold.errors import TenfoldError
from tenfold.formats import packing_of
from tenfold.hub import resolve
from tenfold.memory import Budget
from tenfold.packed import PackedModel, load_packed, read_packed
from tenfold.tokenizer import Tokenizer, load_tokenizer
from tenfold.trace import file as trace

AnyModel = Model | PackedModel
ANY = Budget()
USUAL_CONTEXT = 4096
"""Positions to plan for where nobody says how many, if the model's context is not shorter."""


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
    room = Room(room.batch, min(room.context, config.max_position_embeddings))
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
    elif memory.limit is not None or memory.warm is not None:
        option = "--warm" if memory.limit is None else "--memory"
        raise TenfoldError(f"{option}: {path} {no_budget(path)}")
    else:
        model = load_model(path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise TenfoldError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's"
            f" vocab_size {model.config.vocab_size}"
        )
    return model


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
