"""The compiled kernels, with every instruction set of this machine, against float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold import compiled, panels
from tenfold.config import ModelConfig
from tenfold.engine.native_layers import NativeLayers
from tenfold.errors import TenfoldError
from tenfold.kernels import ACTIVATIONS, native
from tenfold.model.router import Router
from tenfold.packed import PackedExperts, PackedMatrix, packed_experts, packed_matrix
from tenfold.panels import FORMATS, matrix_bytes, pack_matrix, panel_bytes, unpack_matrix

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")
ISAS = compiled.module().isas() if compiled.available() else []
SIZES = st.integers(1, 70)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TENFOLD_ISA", request.param)
    return str(request.param)


def rounded(x_TK: Tensor, form: str) -> Tensor:
    """Activations as the kernels see them: bf16, or 8 bits with a scale for every 32."""
    if form == "bf16":
        return x_TK.bfloat16().double()
    columns = x_TK.shape[1]
    blocks = torch.nn.functional.pad(x_TK, (0, -columns % 32)).unflatten(1, (-1, 32))
    largest = blocks.abs().amax(dim=2, keepdim=True)
    steps = torch.where(largest > 1e-30, torch.full_like(largest, 127) / largest, 0)
    codes = (blocks * steps).round()
    return (codes.double() * largest.double() / 127).flatten(1)[:, :columns]


def dequantised(matrix: PackedMatrix) -> Tensor:
    return unpack_matrix(matrix.panels, matrix.format, matrix.rows, matrix.columns).double()


def assert_near(got: Tensor, wanted: Tensor, scale: Tensor, tolerance: float) -> None:
    """Within `tolerance` of what the terms add up to in size, whatever cancels."""
    assert got.isfinite().all()
    assert ((got.double() - wanted).abs() <= tolerance * scale + 1e-30).all()


def check_linear(weights_NK: Tensor, x_TK: Tensor, form: str, bias_N: Tensor | None = None) -> None:
    matrix = packed_matrix(weights_NK, form)
    W, x = dequantised(matrix), rounded(x_TK, form)
    wanted = x @ W.T + (0 if bias_N is None else bias_N.double())
    size = x.abs() @ W.abs().T + (0 if bias_N is None else bias_N.double().abs())
    assert_near(native.linear(matrix, x_TK, bias_N), wanted, size, 2e-5)


@pytest.mark.parametrize("form", FORMATS)
@settings(deadline=None, max_examples=25)
@given(SIZES, SIZES, SIZES, st.integers(0, 2**31))
def test_linear_is_the_product_of_what_is_packed(
    form: str, rows: int, columns: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    for name in ISAS:  # hypothesis takes no fixtures
        os.environ["TENFOLD_ISA"] = name
        try:
            weights, x, bias = torch.randn(rows, columns), torch.randn(tokens, columns), torch.randn(rows)
            check_linear(weights, x, form, bias if seed % 2 else None)
        finally:
            del os.environ["TENFOLD_ISA"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 70)])
def test_rows_are_those_of_the_matrix(form: str, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    matrix = packed_matrix(torch.randn(rows, columns) * torch.logspace(-2, 2, rows)[:, None], form)
    ids = torch.arange(rows, dtype=torch.int32).flip(0)
    out = torch.empty(rows, columns)
    native.new_linear(matrix).rows(ids.data_ptr(), rows, out.data_ptr())
    assert out.double().equal(dequantised(matrix).flip(0))


EXTREMES = {
    "zeros": lambda x: x * 0,
    "denormals": lambda x: x * 1e-40,
    "tiny": lambda x: x * 1e-32,
    "huge": lambda x: x * 1e30,
    "an outlier": lambda x: x.index_fill(1, torch.tensor([3]), 1e6),
    "outliers everywhere": lambda x: x * torch.exp(4 * torch.randn_like(x)),
    "one block of many zero": lambda x: x.index_fill(1, torch.arange(32), 0),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_activations(isa: str, form: str, extreme: str) -> None:
    torch.manual_seed(0)
    check_linear(torch.randn(40, 96), EXTREMES[extreme](torch.randn(19, 96)), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("extreme", [name for name in EXTREMES if name != "denormals"])
def test_extreme_weights(isa: str, form: str, extreme: str) -> None:
    torch.manual_seed(0)
    check_linear(EXTREMES[extreme](torch.randn(40, 96)), torch.randn(19, 96), form)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none_and_harms_no_other_token(isa: str, form: str, bad: float) -> None:
    torch.manual_seed(0)
    matrix, x = packed_matrix(torch.randn(40, 90), form), torch.randn(19, 90)
    wanted = native.linear(matrix, x)
    x[5, 40] = bad
    got = native.linear(matrix, x)
    assert not got[5].isfinite().any()
    others = torch.arange(19) != 5
    assert got[others].equal(wanted[others])


@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
def test_a_gate_far_below_zero_is_shut(isa: str, activation: str) -> None:
    gate_up, down = torch.zeros(1, 32, 32), torch.ones(1, 32, 16)
    gate_up[0, :16, 0], gate_up[0, 16:, 1] = -1e19, 1.0
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 1e19, 1.0
    packed = packed_experts(gate_up, down, "bf16")
    out = native.experts(packed, x, torch.tensor([[0]]), torch.ones(1, 1), activation)
    assert out.abs().max() < 1e-20


@pytest.mark.parametrize("form", FORMATS)
def test_a_batch_is_its_rows_and_threads_change_nothing(isa: str, form: str) -> None:
    torch.manual_seed(0)
    matrix, x = packed_matrix(torch.randn(130, 200), form), torch.randn(53, 200)
    together = native.linear(matrix, x)
    threads = compiled.module().threads()
    compiled.module().set_threads(threads + 2)
    try:
        assert native.linear(matrix, x).equal(together)
    finally:
        compiled.module().set_threads(threads)
    alone = torch.cat([native.linear(matrix, row[None]) for row in x])
    assert torch.allclose(alone, together, rtol=1e-5, atol=1e-4)


def expert_weights(packed: PackedExperts) -> tuple[Tensor, Tensor]:
    """gate_up (E, 2F, D) and down (E, D, F) of records, read as their layout is described."""
    form, D, F = packed.format, packed.hidden_size, packed.width
    gate_bytes = matrix_bytes(form, F, D)
    gate_up, down = [], []
    for record in packed.records:
        pairs = record[: 2 * gate_bytes].view(-1, 2, panel_bytes(form, D))
        halves = [unpack_matrix(pairs[:, half].flatten(), form, F, D) for half in (0, 1)]
        gate_up.append(torch.cat(halves))
        down.append(unpack_matrix(record[2 * gate_bytes :][: matrix_bytes(form, D, F)], form, D, F))
    return torch.stack(gate_up).double(), torch.stack(down).double()


def by_loop(
    packed: PackedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, activation: str,
    gate_up_bias: Tensor, down_bias: Tensor,
) -> Tensor:  # fmt: skip
    """One slot after another, in float64 but for the two roundings of activations."""
    gate_up, down = expert_weights(packed)
    x = rounded(x_TD, packed.format)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in (ids_TK >= 0).nonzero().tolist():
        e = ids_TK[token, slot]
        hidden = ACTIVATIONS[activation](gate_up[e] @ x[token] + gate_up_bias[e].double())
        y = down[e] @ rounded(hidden.float()[None], packed.format)[0] + down_bias[e].double()
        out[token] += weights_TK[token, slot].double() * y
    return out


def routing(kind: str, tokens: int, experts: int, top_k: int) -> Tensor:
    if kind == "all to one":
        return torch.full((tokens, 1), experts - 1)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    if kind == "one expert idle":
        ids = torch.stack([torch.randperm(experts - 1)[: min(top_k, experts - 1)] + 1 for _ in range(tokens)])
    if kind == "empty slots":
        ids[torch.rand(ids.shape) < 0.5] = -1
    return ids


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu"])
@pytest.mark.parametrize(
    ("kind", "tokens", "top_k"),
    [
        ("random", 1, 2),
        ("random", 45, 3),
        ("random", 7, 5),  # every expert
        ("all to one", 40, 1),
        ("one expert idle", 33, 2),
        ("empty slots", 20, 3),
    ],
)
def test_experts(isa: str, form: str, activation: str, kind: str, tokens: int, top_k: int) -> None:
    torch.manual_seed(0)
    E, D, F = 5, 50, 37
    packed = packed_experts(torch.randn(E, 2 * F, D) / 4, torch.randn(E, D, F) / 4, form)
    biases = torch.randn(E, 2 * F), torch.randn(E, D)
    x, ids = torch.randn(tokens, D), routing(kind, tokens, E, top_k)
    weights = torch.rand(ids.shape)
    got = native.experts(packed, x, ids, weights, activation, *biases)
    wanted = by_loop(packed, x, ids, weights, activation, *biases)
    # A hidden value beside a rounding step may fall to either side of it: one part in 254 of one term.
    assert (got.double() - wanted).norm() <= 2e-3 * wanted.norm() + 1e-9


def test_experts_refuse_what_is_no_routing() -> None:
    packed = packed_experts(torch.randn(2, 8, 8), torch.randn(2, 8, 4), "q8")
    for ids in (torch.tensor([[2]]), torch.tensor([[-2]]), torch.tensor([[0], [1]])):
        with pytest.raises(TenfoldError, match="with ids from -1 to 1"):
            native.experts(packed, torch.randn(1, 8), ids, torch.ones(ids.shape))


ROUTERS = [
    {"router": "softmax", "norm_topk_prob": False},
    {"router": "softmax", "norm_topk_prob": True, "n_group": 4, "topk_group": 2},
    {"router": "topk_softmax", "moe_bias": True, "hidden_act": "clamped_swiglu"},
    {"router": "sigmoid", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    {"router": "sigmoid", "norm_topk_prob": False},
]


ROUTER_SHAPE = {"hidden_size": 40, "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 8}


def by_native_router(router: Router, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    layers = NativeLayers.__new__(NativeLayers)
    layers._config, layers._kept = router.config, []
    layers._weights = {f"r.{name}": tensor for name, tensor in router.state_dict().items()}
    shape = (len(x_TD), router.config.num_experts_per_tok)
    ids, weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
    layers.router("r.")(x_TD.data_ptr(), len(x_TD), ids.data_ptr(), weights.data_ptr())
    return ids.long(), weights


@pytest.mark.parametrize("fields", ROUTERS, ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("in_bf16", [False, True])
def test_routers_choose_as_torch(isa: str, fields: dict[str, object], tokens: int, in_bf16: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig.parse(ROUTER_SHAPE | fields, "test")
    router = Router(config).eval()
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data = torch.randn_like(tensor) / 4
        if in_bf16:
            tensor.data = tensor.data.bfloat16().float()
    x_TD = torch.randn(tokens, 40)
    wanted_ids, wanted_weights, _ = router(x_TD[None])
    ids, weights = by_native_router(router, x_TD)
    assert ids.equal(wanted_ids)
    assert torch.allclose(weights, wanted_weights, atol=1e-6)


def test_a_router_prefers_what_is_no_number(isa: str) -> None:
    """As torch's topk: it must not be passed over for the sake of its neighbours."""
    config = ModelConfig.parse(ROUTER_SHAPE | {"router": "sigmoid"}, "test")
    router = Router(config).eval()
    router.weight.data, router.bias.data = torch.randn(12, 40), torch.zeros(12)
    router.weight.data[7] = math.nan
    ids, weights = by_native_router(router, torch.randn(9, 40))
    assert (ids[:, 0] == 7).all()
    assert weights.isnan().all()


@pytest.mark.parametrize("form", FORMATS)
@settings(deadline=None, max_examples=30)
@given(SIZES, SIZES, st.integers(0, 2**31), st.sampled_from([1e-40, 1e-3, 1.0, 1e30]), st.booleans())
def test_the_compiled_quantiser_is_the_reference_to_the_bit(
    form: str, rows: int, columns: int, seed: int, scale: float, uneven: bool
) -> None:
    torch.manual_seed(seed)
    weights = torch.randn(rows, columns) * scale
    if uneven:
        weights *= torch.exp(2 * torch.randn(rows, columns)).clamp(max=30)
    importance = torch.rand(columns) ** 3 if seed % 2 else None
    compiled_panels = pack_matrix(weights, form, importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels.compiled, "available", lambda: False)
        assert pack_matrix(weights, form, importance).equal(compiled_panels)


def test_errors_beyond_float32_leave_the_quantisers_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No candidate has a finite error: the first one is taken, in torch and in C++."""
    torch.manual_seed(0)
    weights, importance = torch.randn(64, 64) * 1e37, torch.full((64,), 1e38)
    compiled_panels = pack_matrix(weights, "mxfp4", importance)
    monkeypatch.setattr(panels.compiled, "available", lambda: False)
    assert pack_matrix(weights, "mxfp4", importance).equal(compiled_panels)


def test_another_instruction_set_must_be_one_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_ISA", "sse9")
    with pytest.raises(TenfoldError, match=r"TENFOLD_ISA: this machine cannot run 'sse9', only .*portable"):
        compiled.isa()
    with pytest.raises(TenfoldError, match="sse9"):
        native.linear(packed_matrix(torch.randn(16, 32), "q8"), torch.randn(1, 32))


def test_there_are_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "99999999999")
    assert compiled.default_threads() <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert compiled.default_threads() == 1


FORKS = """
import os, sys, threading, torch
from tenfold import compiled
from tenfold.kernels import native
from tenfold.packed import packed_matrix

torch.set_num_threads(1)  # OpenMP's do not survive a fork
compiled.module().set_threads(3)
matrix, x = packed_matrix(torch.randn(400, 640), "q8"), torch.randn(2000, 640)
wanted = native.linear(matrix, x)
stop = False

def work():
    while not stop:
        native.linear(matrix, x)

threading.Thread(target=work).start()
for _ in range(5):
    if (child := os.fork()) == 0:
        os._exit(0 if native.linear(matrix, x).equal(wanted) else 1)
    if os.waitpid(child, 0)[1] != 0:
        os._exit(1)
stop = True
if os.fork() == 0:
    sys.exit()  # with all that exits do, and no call in this process
sys.exit(os.waitpid(-1, 0)[1])
"""


def test_a_forked_process_has_threads_of_its_own_and_ends() -> None:
    """Forked between calls and during one; a child that waits for threads it has not never ends."""
    assert subprocess.run([sys.executable, "-c", FORKS], timeout=60).returncode == 0
