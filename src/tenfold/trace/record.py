"""Recording a trace: a model reads texts, a window at a time, and its routers are watched."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold.checkpoint import load_config
from tenfold.checkpoint.pack.record import record_bytes
from tenfold.config import ModelConfig
from tenfold.engine.loading import ANY, USUAL_CONTEXT, AnyModel, load_model_for
from tenfold.errors import TenfoldError
from tenfold.hub import resolve
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel
from tenfold.switch_config import AnyConfig, decoder_only
from tenfold.tokenizer import Tokenizer, load_tokenizer
from tenfold.trace.file import Ids, Segment, Trace, TraceHeader
from tenfold.trace.routes import Routes, packed_routes, torch_routes
from tenfold.train.corpus import read_documents

WINDOW = 1024
"""Tokens read at once, each of which sees those before it in its window."""
TOKEN_CHARACTERS = 16
"""More than a token has on average: of a long text, that many times the tokens wanted are read."""


def record(path_or_id: str, sources: Sequence[str], tokens: int) -> Trace:
    """The trace of a model (directory, GGUF file or hub id) that reads `tokens` tokens of texts.

    Each source, as `train` takes them, is a kind of text, and all have equal shares of the tokens; one that
    is shorter ends early. Raises TenfoldError for sources without text and models without experts.
    """
    path = resolve(path_or_id)
    config = _traceable(load_config(path), path_or_id)
    tokenizer = load_tokenizer(path)
    kinds = dict.fromkeys(sources)
    share, size = -(-tokens // len(kinds)), min(WINDOW, config.max_position_embeddings)
    texts = {_name(source): list(_windows(source, tokenizer, share, size)) for source in kinds}
    return trace_of(load_model_for(tokenizer, path, ANY, USUAL_CONTEXT), _name(path_or_id), texts)


def trace_of(model: AnyModel, name: str, windows: dict[str, list[Tensor]]) -> Trace:
    """The trace of a model in memory that reads windows of token ids (T,) by kind of text.

    Raises TenfoldError for a model without experts, or whose experts choose their tokens.
    """
    config = _traceable(model.config, name)
    layers = config.sparse_layers
    fields = {
        "model": name,
        "layers": tuple(layers),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "expert_bytes": _expert_bytes(model, layers[0]),
        "segments": tuple(Segment(kind=kind, tokens=sum(map(len, parts))) for kind, parts in windows.items()),
    }
    header = TraceHeader.parse(fields, name)
    every_window = (window for parts in windows.values() for window in parts)
    seen = list(_routes(model, every_window))
    chosen = _stack([[routes.chosen[n] for n in header.layers] for routes in seen], header)
    ahead = _stack([[routes.ahead[n] for n in header.foreseen] for routes in seen], header)
    return Trace(header, chosen, ahead)


def _traceable(config: AnyConfig, name: str) -> ModelConfig:
    config = decoder_only(config, name)
    if not config.is_sparse:
        raise TenfoldError(f"{name} is dense: there are no experts to trace")
    if config.router == "expert_choice":
        raise TenfoldError(f"{name}: router expert_choice cannot be traced: its experts choose tokens")
    return config


def _name(path: str) -> str:
    """As text: the name of a file may hold bytes that are none."""
    return path.encode(errors="replace").decode()


def _windows(source: str, tokenizer: Tokenizer, tokens: int, size: int) -> Iterator[Tensor]:
    """The first `tokens` tokens of a source, `size` at most at once and never of two documents."""
    left = tokens
    for document in read_documents([source]):
        ids = tokenizer.encode(document.text[: left * TOKEN_CHARACTERS])[:left]
        yield from torch.tensor(ids).split(size) if ids else ()
        left -= len(ids)
        if left == 0:
            return
    if left == tokens:
        raise TenfoldError(f"{source}: the model's tokenizer makes no tokens of its text")


def _routes(model: AnyModel, windows: Iterator[Tensor]) -> Iterator[Routes]:
    if isinstance(model, PackedModel):
        return packed_routes(model, windows, WINDOW)
    assert isinstance(model, Transformer)
    return torch_routes(model, windows)


def _stack(windows: list[list[list[Tensor]]], header: TraceHeader) -> Ids:
    """(T, layers, K) of pieces (T, K), by window, layer and order."""
    if not windows[0]:
        return np.empty((header.tokens, 0, header.num_experts_per_tok), np.uint16)
    by_window = [torch.stack([torch.cat(pieces) for pieces in layers], dim=1) for layers in windows]
    ids: Ids = torch.cat(by_window).cpu().numpy().astype(np.uint16)
    return ids


def _expert_bytes(model: AnyModel, layer: int) -> int:
    name = f"layers.{layer}.mlp.experts"
    if isinstance(model, PackedModel):
        experts: Any = model.weights[name]
        return record_bytes(experts.format, experts.hidden_size, experts.width)
    weights = model.state_dict()
    return sum(weights[f"{name}.{part}"][0].nbytes for part in ("gate_up", "down"))
