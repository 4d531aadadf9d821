"""The parts of a packed model as the tensors of its files."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tenfold.checkpoint.pack.layout import Experts, Matrix, Part, Plain
from tenfold.checkpoint.pack.record import pack_record
from tenfold.checkpoint.pack.shard import Entry
from tenfold.checkpoint.pack.source import OwnTensor
from tenfold.panels import pack_matrix

Importance = Mapping[str, Tensor]
"""Mean squared input of each column, by the name of our tensor: (K,), of stacked experts (E, K)."""


def entries(part: Part, tensors: dict[str, OwnTensor], importance: Importance) -> Iterator[Entry]:
    """What a file holds of a part, each tensor read and packed only when it is written."""
    dtype = tensors[part.name].dtype if isinstance(part, Plain) else torch.uint8
    for number, (name, shape) in enumerate(part.stored.items()):

        def chunks(number: int = number) -> Iterator[Tensor]:
            if isinstance(part, Experts):
                yield _record(part, number, tensors, importance)
            elif isinstance(part, Matrix):
                for rows in tensors[part.name].pieces():
                    yield pack_matrix(rows, part.format, importance.get(part.name))
            else:
                yield tensors[part.name].whole().to(dtype)

        yield Entry(name, dtype, shape, part.label, chunks)


def _record(part: Experts, expert: int, tensors: dict[str, OwnTensor], importance: Importance) -> Tensor:
    names = (f"{part.name}.gate_up", f"{part.name}.down")
    gate_up, down = (tensors[name].read(expert, expert + 1)[0] for name in names)
    inputs = (importance[name][expert] if name in importance else None for name in names)
    return pack_record(gate_up, down, part.format, *inputs)
