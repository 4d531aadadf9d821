"""A trace on disk: a safetensors file of expert ids, whose metadata say what they are of.

Tensor `experts` (T, L, K) holds the experts that each token chose; `lookahead` (T, foreseen layers, K) those
that the layer's router would have chosen one layer earlier: of the residual stream before the feed-forward of
the layer before it. Ids take a byte, or two where there are more than 256 experts a layer. `__metadata__`
holds a `TraceHeader` as JSON under `experts`.
"""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tenfold.checkpoint.safetensors import list_file
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.files import write_bytes
from tenfold.parsed import MAX_LAYERS, Parsed

Ids = npt.NDArray[np.unsignedinteger[Any]]

MAX_EXPERTS = 1 << 15
"""All layers' counted, more than any published model has: fitting capacities takes time by its square."""
Count = Annotated[int, Field(gt=0)]


class Segment(Parsed):
    """So many tokens of one kind of text."""

    kind: str
    tokens: Count


class TraceHeader(Parsed):
    """What a trace is of. Fields of the model are named as in config.json."""

    format: Literal["tenfold-trace-1"] = "tenfold-trace-1"
    model: str
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=MAX_LAYERS)
    """The decoder layers that have experts, counted from 0."""
    num_experts: Count
    num_experts_per_tok: Count
    expert_bytes: Count
    """One expert of one layer, as the model that was traced holds it."""
    segments: tuple[Segment, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "TraceHeader":
        if any(after <= before for before, after in pairwise(self.layers)):
            raise ValueError("layers must rise")
        if len({segment.kind for segment in self.segments}) < len(self.segments):
            raise ValueError("segments must be of different kinds")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok is more than num_experts {self.num_experts}")
        if self.num_experts * len(self.layers) > MAX_EXPERTS:
            raise ValueError(f"layers and num_experts make more than {MAX_EXPERTS:,} experts")
        return self

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def foreseen(self) -> tuple[int, ...]:
        """The layers that have a layer before them, from which their router can look ahead."""
        return tuple(layer for layer in self.layers if layer > 0)


@dataclass(frozen=True, eq=False)
class Trace:
    header: TraceHeader
    experts_TLK: Ids
    lookahead_TLK: Ids
    """Of the layers `header.foreseen`."""


def save(trace: Trace, path: Path) -> None:
    """Raises TenfoldError where the system refuses."""
    arrays = {"experts": trace.experts_TLK, "lookahead": trace.lookahead_TLK}
    small = np.uint8 if trace.header.num_experts <= 256 else np.uint16
    header: dict[str, Any] = {"__metadata__": {"experts": trace.header.model_dump_json()}}
    data = b""
    for name, array in arrays.items():
        stored = array.astype(small).tobytes()
        offsets = [len(data), len(data) + len(stored)]
        kind = "U8" if small is np.uint8 else "U16"
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
        data += stored
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, len(text).to_bytes(8, "little") + text + data)


def load(path: Path) -> Trace:
    """Raises TenfoldError if it is no trace, or one that contradicts itself."""
    if path.is_dir():
        raise TenfoldError(f"{path} is a folder: name a trace, or record one of a model there with --data")
    if not path.exists():
        raise TenfoldError(f"{path}: no such trace; one of a model is recorded with --data and --out")
    tensors = list_file(path)
    if tensors.keys() != {"experts", "lookahead"}:
        raise TenfoldError(f"{path}: not a trace, which has the tensors experts and lookahead and no other")
    header = _header(path, tensors["experts"].note)
    layers = {"experts": header.layers, "lookahead": header.foreseen}
    experts, lookahead = (_ids(path, header, tensors[name], len(layers[name])) for name in layers)
    return Trace(header, experts, lookahead)


def hottest(path: Path, config: ModelConfig) -> list[tuple[int, int]]:
    """Every (decoder layer, expert) that the trace has seen, the most used first.

    Raises TenfoldError if the trace is not of a model of this shape.
    """
    trace = load(path)
    header = trace.header
    for field, ours in (
        ("layers", tuple(config.sparse_layers)),
        ("num_experts", config.num_experts),
        ("num_experts_per_tok", config.num_experts_per_tok),
    ):
        if getattr(header, field) != ours:
            raise TenfoldError(f"{path}: a trace of another model: its {field} are not this model's")
    uses_LE = counts(trace.experts_TLK, header.num_experts)
    order = np.argsort(-uses_LE, axis=None, kind="stable")[: np.count_nonzero(uses_LE)]
    rows, experts = np.unravel_index(order, uses_LE.shape)
    return [(header.layers[row], int(expert)) for row, expert in zip(rows, experts, strict=True)]


def counts(ids_TLK: Ids, num_experts: int) -> npt.NDArray[np.int64]:
    """How often each expert was chosen: (L, E)."""
    layers = range(ids_TLK.shape[1])
    return np.stack([np.bincount(ids_TLK[:, n].ravel(), minlength=num_experts) for n in layers])


def _header(path: Path, text: str) -> TraceHeader:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise TenfoldError(f"{path}: not a trace: its metadata do not say what it is of")
    return TraceHeader.parse(values, str(path))


def _ids(path: Path, header: TraceHeader, raw: Any, layers: int) -> Ids:
    shape = (header.tokens, layers, header.num_experts_per_tok)
    if str(raw.dtype) not in ("torch.uint8", "torch.uint16") or raw.shape != shape:
        raise TenfoldError(f"{path}: tensor {raw.name} must be bytes or pairs of them, of shape {shape}")
    ids: Ids = raw.read(0, header.tokens).numpy()
    if ids.size and ids.max() >= header.num_experts:
        raise TenfoldError(f"{path}: tensor {raw.name} has expert {ids.max()} of {header.num_experts}")
    if not (np.diff(np.sort(ids, axis=-1).astype(np.int32), axis=-1) > 0).all():
        raise TenfoldError(f"{path}: tensor {raw.name} has a token that chose an expert twice")
    return ids
