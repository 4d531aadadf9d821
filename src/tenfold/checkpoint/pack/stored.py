"""A packed model as any other checkpoint: tensors that are decoded as they are read."""

from pathlib import Path

from torch import Tensor

from tenfold.checkpoint.pack.layout import Experts, Matrix, Part
from tenfold.checkpoint.pack.opened import find_parts, packed_config
from tenfold.checkpoint.pack.record import down_offset, panel_rows
from tenfold.checkpoint.raw import RawTensor
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.checkpoint.slot import part as part_of
from tenfold.checkpoint.stored import Stored
from tenfold.panels import PANEL_ROWS, panel_bytes, unpack_matrix


def packed_tensors(raws: dict[str, RawTensor], config_json: Path) -> dict[str, Stored]:
    """Every weight of a packed model's files, as float32 matrices: of an expert gate, up and down.

    Raises TenfoldError as `find_parts` does.
    """
    found = find_parts(raws, packed_config(config_json)[1], config_json)
    return {stored.name: stored for there in found for stored in _stored(*there)}


def packed_slots(config_json: Path) -> SlotMap:
    """Where those go."""
    return {name: slot for part in packed_config(config_json)[1] for name, slot in _slots(part).items()}


def _slots(part: Part) -> SlotMap:
    if not isinstance(part, Experts):
        return {part.name: Slot(part.name)}
    slots, F = {}, part.width
    for expert in range(part.count):
        record, gate_up = f"{part.name}.{expert}", f"{part.name}.gate_up"
        slots[f"{record}.gate"] = Slot(gate_up, part_of(expert, slice(0, F)))
        slots[f"{record}.up"] = Slot(gate_up, part_of(expert, slice(F, 2 * F)))
        slots[f"{record}.down"] = Slot(f"{part.name}.down", part_of(expert))
    return slots


def _stored(part: Part, raws: list[RawTensor]) -> list[Stored]:
    if isinstance(part, Experts):
        return [stored for raw in raws for stored in _of_record(raw, part)]
    (raw,) = raws
    if isinstance(part, Matrix):
        return [_matrix(raw, part, 0, panel_bytes(part.format, part.columns), raw.num_bytes)]
    form = str(raw.dtype).removeprefix("torch.")
    return [Stored(raw.name, raw.file, raw.shape, form, raw.num_bytes, raw.read)]


def _of_record(raw: RawTensor, part: Experts) -> list[Stored]:
    form, D, F = part.format, part.hidden_size, part.width
    gate, up = (Matrix(f"{raw.name}.{half}", F, D, form) for half in ("gate", "up"))
    down, at = Matrix(f"{raw.name}.down", D, F, form), down_offset(form, D, F)
    wide = panel_bytes(form, D)
    return [
        _matrix(raw, gate, 0, 2 * wide, at // 2),
        _matrix(raw, up, wide, 2 * wide, at // 2),
        _matrix(raw, down, at, panel_bytes(form, F), raw.num_bytes - at),
    ]


def _matrix(raw: RawTensor, matrix: Matrix, at: int, step: int, num_bytes: int) -> Stored:
    """One whose panels begin every `step` bytes from byte `at` of `raw`."""
    size = panel_bytes(matrix.format, matrix.columns)

    def read(start: int, stop: int) -> Tensor:
        first, end = panel_rows(start, stop)
        data = raw.read(at + first * step, at + (end - 1) * step + size)
        panels = data.as_strided((end - first, size), (step, 1)).flatten()
        skipped = first * PANEL_ROWS
        rows = min(end * PANEL_ROWS, matrix.rows) - skipped
        whole = unpack_matrix(panels, matrix.format, rows, matrix.columns)
        return whole[start - skipped : stop - skipped]

    return Stored(matrix.name, raw.file, (matrix.rows, matrix.columns), matrix.format, num_bytes, read)
