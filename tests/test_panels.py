"""Packed matrices: every byte where the layout says, every shape, and what is refused."""

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.counting import BITS_PER_WEIGHT
from tenfold.errors import TenfoldError
from tenfold.panels import FORMATS, matrix_bytes, pack_matrix, panel_bytes, unpack_matrix
from tenfold.quantization import FP4_VALUES, Q4_VALUES

few = settings(max_examples=60, deadline=None, derandomize=True)
forms = pytest.mark.parametrize("form", FORMATS)


DIGESTS = {
    "bf16": "67ca6660ebfa7cef",
    "q8": "e6db5059ee7a0780",
    "q4": "ad48bd3283d540dd",
    "mxfp4": "b6d6b2981a52aa26",
}


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def minifloat(code: int) -> float:
    return (-1.0 if code >> 7 else 1.0) * math.ldexp(1 + (code & 15) / 16, (code >> 4 & 7) - 7)


def nibble(block: bytes, row: int, column: int) -> int:
    group, c = divmod(column, 4)
    byte = block[group // 2 * 64 + row * 4 + c]
    return byte >> 4 if group % 2 else byte & 15


def weight_at(panels: bytes, form: str, columns: int, n: int, k: int) -> float:
    """One weight, from the bytes that the layout gives it."""
    blocks, row, (b, column) = math.ceil(columns / 32), n % 16, divmod(k, 32)
    size = {"bf16": 1024, "q8": 512, "q4": 256, "mxfp4": 256}[form]
    panel = panels[n // 16 * panel_bytes(form, columns) :]
    block = panel[b * size : (b + 1) * size]
    if form == "bf16":
        at = column // 2 * 64 + row * 4 + column % 2 * 2
        return float(struct.unpack("<f", b"\0\0" + block[at : at + 2])[0])
    scale = panel[blocks * size + b * 16 + row]
    if form == "mxfp4":
        return math.ldexp(FP4_VALUES[nibble(block, row, column)], scale - 127)
    (row_scale,) = struct.unpack_from("<f", panel, blocks * (size + 16) + row * 4)
    if form == "q8":
        value = block[column // 4 * 64 + row * 4 + column % 4] - 128
    else:
        value = Q4_VALUES[nibble(block, row, column)]
    return float(row_scale) * minifloat(scale) * value


@forms
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 32), (19, 70), (33, 31)])
def test_bytes_lie_where_the_layout_says(form: str, rows: int, columns: int) -> None:
    weights = gaussian(rows, columns) * torch.logspace(-2, 2, rows)[:, None]
    packed = pack_matrix(weights, form)
    data = bytes(packed.tolist())
    found = [[weight_at(data, form, columns, n, k) for k in range(columns)] for n in range(rows)]
    assert torch.equal(unpack_matrix(packed, form, rows, columns), torch.tensor(found))
    assert (torch.tensor(found) - weights).norm() < 0.2 * weights.norm()


@forms
def test_the_bits_of_a_format_never_change(form: str) -> None:
    """Packed models are on disks, and faster quantisers are held to these bits."""
    weights = (torch.arange(33 * 70) * 40503 % 65536 - 32768).view(33, 70) / 2**15
    weights[20, :32], weights[21, 0] = 0, 300
    importance = torch.arange(70) / 7
    digest = hashlib.sha256(bytes(pack_matrix(weights**3, form, importance).tolist())).hexdigest()
    assert digest[:16] == DIGESTS[form]


@forms
def test_padding_is_zero(form: str) -> None:
    packed = pack_matrix(gaussian(17, 33), form)
    whole = unpack_matrix(packed, form, 32, 64)
    assert whole[17:].count_nonzero() == whole[:, 33:].count_nonzero() == 0


@forms
def test_sizes(form: str) -> None:
    assert panel_bytes(form, 33) % 64 == 0
    assert (
        matrix_bytes(form, 33, 100) == 3 * panel_bytes(form, 100) == len(pack_matrix(gaussian(33, 100), form))
    )
    columns = 4096
    row_scales = 64 if form in ("q8", "q4") else 0
    bits = BITS_PER_WEIGHT["bfloat16" if form == "bf16" else form]
    assert panel_bytes(form, columns) - row_scales == 16 * columns * bits / 8


@forms
def test_panels_do_not_depend_on_each_other(form: str) -> None:
    """More weights than are worked on at once, as one matrix and as its panels."""
    weights, importance = gaussian(296, 1000), gaussian(1, 1000, seed=1)[0].square()
    panels = [pack_matrix(part, form, importance) for part in weights.split(16)]
    packed = pack_matrix(weights, form, importance)
    assert torch.equal(packed, torch.cat(panels))
    parts = [unpack_matrix(panel, form, min(16, 296 - 16 * i), 1000) for i, panel in enumerate(panels)]
    assert torch.equal(unpack_matrix(packed, form, 296, 1000), torch.cat(parts))


@forms
def test_parameters_and_views_are_packed(form: str) -> None:
    weights = gaussian(64, 32)
    expected = pack_matrix(weights.T.clone(memory_format=torch.contiguous_format), form)
    assert torch.equal(pack_matrix(torch.nn.Parameter(weights).T, form), expected)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Odd shapes; rows and single weights from nothing to nearly the largest there is."""
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    weights = gaussian(rows, columns, draw(st.integers(0, 9)))
    exponents = draw(st.lists(st.integers(-149, 123), min_size=1, max_size=3))
    weights = (
        weights.double() * 2.0 ** torch.tensor(exponents).double()[torch.arange(rows) % len(exponents), None]
    )
    for exponent in draw(st.lists(st.integers(-149, 126), max_size=4)):
        weights[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = -(2.0**exponent)
    if draw(st.booleans()):
        weights[:, : draw(st.integers(0, columns))] = 0
    return weights.float()


def largest_in_blocks(weights: Tensor) -> Tensor:
    """For every weight the largest |weight| of its block."""
    return torch.cat(
        [part.abs().amax(1, keepdim=True).expand_as(part) for part in weights.split(32, dim=1)], 1
    )


@few
@given(weights=matrices(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_any_matrix_comes_back(weights: Tensor, dtype: torch.dtype) -> None:
    weights = weights.to(dtype).float()
    largest, row = largest_in_blocks(weights).double(), weights.abs().amax(1, keepdim=True).double()
    for form in FORMATS:
        back = unpack_matrix(pack_matrix(weights.to(dtype), form), form, *weights.shape)
        assert back.shape == weights.shape
        assert back[largest == 0].count_nonzero() == 0
        # Half the widest step between values, where the scale is as fine as its format can have it.
        step = {"bf16": 2**-8, "q8": 0.54 / 127, "q4": 14 / 127, "mxfp4": 0.25}[form]
        floor = {"bf16": 2.0**-134, "mxfp4": 2.0**-127}.get(form, 2.0**-101) + row * 2.0 ** (
            -12 if form in ("q8", "q4") else -200
        )
        worst = step * largest + floor
        errors = (back.double() - weights).abs()
        if form in ("q4", "mxfp4"):  # least squares: one weight may pay for the others of its block
            errors = errors / math.sqrt(32)
        assert bool((errors <= worst).all())


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**127, -3.4e38])
def test_weights_that_are_no_numbers_are_refused(form: str, bad: float) -> None:
    weights = gaussian(20, 40)
    weights[19, 39] = bad
    with pytest.raises(TenfoldError, match="NaN, infinity"):
        pack_matrix(weights, form)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (torch.ones(39), r"importance of shape \(39,\): needs one number a column \(40\)"),
        (torch.full((40,), -1.0), "finite and not negative"),
        (torch.full((40,), math.nan), "finite and not negative"),
        (torch.full((40,), math.inf), "finite and not negative"),
    ],
)
def test_importance_that_does_not_fit(importance: Tensor, message: str) -> None:
    with pytest.raises(TenfoldError, match=message):
        pack_matrix(gaussian(20, 40), "q4", importance)


def test_other_formats_and_sizes_are_refused() -> None:
    with pytest.raises(TenfoldError, match="format 'q5' is unknown: use one of bf16, q8, q4, mxfp4"):
        pack_matrix(gaussian(1, 1), "q5")
    packed = pack_matrix(gaussian(20, 40), "q4")
    for panels in (packed[:-1], packed.view(2, -1), packed.float()):
        with pytest.raises(TenfoldError, match="is no q4 matrix of 20 x 40: needs 1280 bytes"):
            unpack_matrix(panels, "q4", 20, 40)
