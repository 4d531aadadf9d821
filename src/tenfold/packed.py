"""Packed models in memory: matrices and experts in the kernels' own layout, as `tenfold pack` stores them."""

import mmap
import os
import warnings
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from tenfold import compiled
from tenfold.checkpoint.pack.layout import Experts, Matrix, Part, parts_by_file, without_predictor
from tenfold.checkpoint.pack.opened import Found, find_parts, packed_config
from tenfold.checkpoint.pack.record import pack_record, record_bytes, whole_pages
from tenfold.checkpoint.pack.verify import damaged, written_checksum
from tenfold.checkpoint.raw import RawTensor
from tenfold.checkpoint.weights import list_raw
from tenfold.config import ModelConfig
from tenfold.engine.expert_store import ExpertStore
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


@dataclass(frozen=True)
class StreamedExperts:
    """All routed experts of a layer, as many of them in memory as their store has slots for."""

    store: ExpertStore
    layer: int
    """Of the store's."""
    count: int
    format: str
    hidden_size: int
    width: int

    @property
    def nbytes(self) -> int:
        """Of all records, wherever they are."""
        return self.count * record_bytes(self.format, self.hidden_size, self.width)


Weight = Tensor | PackedMatrix | PackedExperts | StreamedExperts


@dataclass(frozen=True)
class PackedModel:
    """A decoder-only model without the module that predicts further ahead."""

    config: ModelConfig
    weights: dict[str, Weight]
    """By the names of our model's state_dict; `layers.3.mlp.experts` stands for gate_up and down."""
    store: ExpertStore | None = None
    """Of all its experts, where they are streamed."""
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
    A process whose file is cut short meanwhile ends with one line (csrc/lost_file.hpp).
    Raises TenfoldError if it is no packed model, or naming what is missing or does not fit its config.json.
    """
    config, found = _open(path_or_id)
    if compiled.available():
        compiled.module().end_where_a_file_is_lost()
    maps = {file: _map(file) for file in {raw.file for there in found for raw in there.raws}}
    return PackedModel(config, {there.part.name: _mapped(there, maps) for there in found})


def read_packed(path_or_id: str | Path, slots: int) -> PackedModel:
    """The same with `slots` experts in memory at a time, and all else read into memory of its own.

    None of it stays in the page cache, and everything is checked against its checksum as it is read.
    Raises TenfoldError as `load_packed` and `ExpertStore` do, and naming a damaged tensor.
    """
    config, found = _open(path_or_id)
    experts = [there for there in found if isinstance(there.part, Experts)]
    store = ExpertStore(experts, slots) if experts else None
    layers = count()
    weights: dict[str, Weight] = {}
    for there in found:
        if isinstance(part := there.part, Experts):
            assert store is not None
            shape = (part.count, part.format, part.hidden_size, part.width)
            weights[part.name] = StreamedExperts(store, next(layers), *shape)
        else:
            weights[part.name] = _weight(there, _read(there.raws[0]))
    return PackedModel(config, weights, store)


def _open(path_or_id: str | Path) -> tuple[ModelConfig, list[Found]]:
    directory = resolve(path_or_id)
    config_json = directory / "config.json"
    config, parts = packed_config(config_json)
    return config, find_parts(list_raw(directory), parts, config_json)


def _read(raw: RawTensor) -> Tensor:
    """A tensor's bytes, in pages of their own as direct reads want them."""
    pages = mmap.mmap(-1, whole_pages(raw.num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    data = torch.frombuffer(pages, dtype=torch.uint8)[: raw.num_bytes]
    compiled.module().read_file(os.fsencode(raw.file), raw.offset, raw.num_bytes, data.data_ptr())
    there, written = compiled.module().crc32(data.data_ptr(), raw.num_bytes), written_checksum(raw)
    if there != written:
        raise TenfoldError(f"{raw.file}: {damaged(f'tensor {raw.name}', there, written)}")
    return data


def _mapped(found: Found, maps: dict[Path, Tensor]) -> Weight:
    part, first = found.part, found.raws[0]
    data = maps[first.file][first.offset :]
    if isinstance(part, Experts):
        records = data[: part.count * part.record_bytes].view(part.count, -1)
        return PackedExperts(records, part.format, part.hidden_size, part.width)
    return _weight(found, data)


def _weight(found: Found, data: Tensor) -> Tensor | PackedMatrix:
    """A matrix or a plain tensor whose bytes `data` begins with."""
    part, raw = found.part, found.raws[0]
    if isinstance(part, Matrix):
        return PackedMatrix(data[: part.num_bytes], part.format, part.rows, part.columns)
    return data[: raw.num_bytes].view(raw.dtype).view(raw.shape)


def _map(file: Path) -> Tensor:
    try:
        with file.open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise TenfoldError(f"{file}: cannot be mapped ({error.strerror or error})") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written to
        return torch.frombuffer(pages, dtype=torch.uint8)
