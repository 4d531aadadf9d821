"""Packed models in memory: matrices and experts in the kernels' own layout, as `tenfold pack` stores them."""

import mmap
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tenfold.checkpoint.pack.layout import Experts, Matrix, Part, parts_by_file, without_predictor
from tenfold.checkpoint.pack.opened import Found, find_parts, packed_config
from tenfold.checkpoint.pack.record import pack_record
from tenfold.checkpoint.weights import list_raw
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.formats import ExpertsFormat, Packing, RestFormat
from tenfold.hub import resolve
from tenfold.memory import Plan
from tenfold.model.transformer import Transformer
from tenfold.panels import pack_matrix


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (rows, columns) as `tenfold.panels` lays it out."""

    panels: Tensor
    """uint8, one axis."""
    format: str
    rows: int
    columns: int


@dataclass(frozen=True)
class PackedExperts:
    """All routed experts of a layer, a record each, as `tenfold.checkpoint.pack.record` lays it out."""

    records: Tensor
    """uint8, (E, bytes of a record), contiguous."""
    format: str
    hidden_size: int
    width: int


Weight = Tensor | PackedMatrix | PackedExperts


@dataclass(frozen=True)
class PackedModel:
    """A decoder-only model without the module that predicts further ahead."""

    config: ModelConfig
    weights: dict[str, Weight]
    """By the names of our model's state_dict; `layers.3.mlp.experts` stands for gate_up and down."""
    plan: Plan | None = None
    """What a memory budget leaves for running it; None is no limit."""


def packed_matrix(weights_NK: Tensor, form: str) -> PackedMatrix:
    return PackedMatrix(pack_matrix(weights_NK, form), form, *weights_NK.shape)


def packed_experts(gate_up_E2FD: Tensor, down_EDF: Tensor, form: str) -> PackedExperts:
    _, hidden_size, width = down_EDF.shape
    pairs = zip(gate_up_E2FD, down_EDF, strict=True)
    records = torch.stack([pack_record(gate_up, down, form) for gate_up, down in pairs])
    return PackedExperts(records, form, hidden_size, width)


@torch.no_grad()
def packed_of(model: Transformer, experts: ExpertsFormat = "q4", rest: RestFormat = "q8") -> PackedModel:
    """A model in memory, packed there: what `load_packed` gives of the same model saved and packed."""
    config = without_predictor(model.config)
    tensors = model.state_dict()
    files = parts_by_file(config, Packing(experts=experts, rest=rest))
    return PackedModel(config, {part.name: _pack(part, tensors) for parts in files for part in parts})


def _pack(part: Part, tensors: dict[str, Tensor]) -> Weight:
    if isinstance(part, Experts):
        return packed_experts(tensors[f"{part.name}.gate_up"], tensors[f"{part.name}.down"], part.format)
    if isinstance(part, Matrix):
        return packed_matrix(tensors[part.name], part.format)
    return tensors[part.name].clone()


def load_packed(path_or_id: str | Path) -> PackedModel:
    """The packed model of a directory or hub id, its files mapped: nothing is read before it is used.

    Its tensors share the pages of the files with every process that maps them, and must not be written to.
    Raises TenfoldError if it is no packed model, or naming what is missing or does not fit its config.json.
    """
    directory = resolve(path_or_id)
    config_json = directory / "config.json"
    config, parts = packed_config(config_json)
    found = find_parts(list_raw(directory), parts, config_json)
    maps = {file: _map(file) for file in {raw.file for there in found for raw in there.raws}}
    return PackedModel(config, {there.part.name: _mapped(there, maps) for there in found})


def _mapped(found: Found, maps: dict[Path, Tensor]) -> Weight:
    part, first = found.part, found.raws[0]
    data = maps[first.file][first.offset :]
    if isinstance(part, Experts):
        records = data[: part.count * part.record_bytes].view(part.count, -1)
        return PackedExperts(records, part.format, part.hidden_size, part.width)
    if isinstance(part, Matrix):
        return PackedMatrix(data[: part.num_bytes], part.format, part.rows, part.columns)
    return data[: first.num_bytes].view(first.dtype).view(first.shape)


def _map(file: Path) -> Tensor:
    try:
        with file.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise TenfoldError(f"{file}: cannot be mapped ({error.strerror or error})") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written to
        return torch.frombuffer(pages, dtype=torch.uint8)
