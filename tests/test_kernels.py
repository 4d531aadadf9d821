"""Every backend against the reference, and the reference against float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.kernels import ACTIVATIONS, EMPTY_SLOT, grouped_mm, reference

BACKENDS = {"grouped_mm": grouped_mm.experts}


def routing(kind: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """Expert ids (T, K), random and adversarial."""
    if kind == "all to one":
        return torch.zeros(tokens, 1, dtype=torch.long).expand(tokens, top_k)
    ids = torch.rand(tokens, experts).topk(top_k, dim=-1).indices
    if kind == "an idle expert" and experts > top_k:
        ids = torch.rand(tokens, experts - 1).topk(top_k, dim=-1).indices
    if kind == "empty slots":
        ids = ids.masked_fill(torch.rand(tokens, top_k) < 0.4, EMPTY_SLOT)
    if kind == "all empty":
        ids = torch.full_like(ids, EMPTY_SLOT)
    return ids


KINDS = ["random", "all to one", "an idle expert", "empty slots", "all empty"]


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    width=st.sampled_from([4, 8, 5]),
    hidden=st.sampled_from([4, 12, 7]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_reference(
    backend: str,
    kind: str,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    hidden: int,
    activation: str,
    biased: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ids = routing(kind, tokens, experts, min(top_k, experts))
    rows = width if activation == "relu" else 2 * width
    inputs = (
        torch.randn(tokens, hidden),
        torch.randn(experts, rows, hidden),
        torch.randn(experts, hidden, width),
        torch.rand(ids.shape),
    )
    if biased:
        inputs += (torch.randn(experts, rows), torch.randn(experts, hidden))
    upstream = torch.randn(tokens, hidden)
    ours = run(BACKENDS[backend], inputs, ids, upstream, activation)
    truth = run(reference.experts, tuple(t.double() for t in inputs), ids, upstream.double(), activation)
    for mine, true in zip(ours, truth, strict=True):
        # Terms are of the order of one; where they cancel, their rounding is all that is left.
        assert (mine.double() - true).norm() <= 1e-5 * true.norm() + 3e-6


def run(
    backend, inputs: tuple[Tensor, ...], ids: Tensor, upstream: Tensor, activation: str = "silu"
) -> list[Tensor]:
    """Output and the gradients of x, gate_up, down, the weights and, where they are given, the biases."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    x, gate_up, down, weights, *biases = leaves
    out = backend(x, gate_up, down, ids, weights, activation, *biases)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def test_reference_is_the_formula() -> None:
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(3, 4), torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    ids, weights = torch.tensor([[0, 1], [1, 0], [1, EMPTY_SLOT]]), torch.rand(3, 2)
    out = reference.experts(x, gate_up, down, ids, weights)
    for token in range(3):
        want = torch.zeros(4)
        for slot in range(2):
            expert = int(ids[token, slot])
            if expert >= 0:
                gate, up = (gate_up[expert] @ x[token]).split(3)
                want += weights[token, slot] * (down[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(out[token], want)


def test_clamped_swiglu_is_the_formula() -> None:
    """gpt-oss, expert by expert, with biases; large enough that both clamps bite."""
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(3, 4), 6 * torch.randn(2, 6, 4), torch.randn(2, 4, 3)
    gate_up_bias, down_bias = torch.randn(2, 6), torch.randn(2, 4)
    ids, weights = torch.tensor([[0], [1], [1]]), torch.rand(3, 1)
    out = reference.experts(x, gate_up, down, ids, weights, "clamped_swiglu", gate_up_bias, down_bias)
    for token, expert in enumerate(ids.flatten().tolist()):
        gate, up = (gate_up[expert] @ x[token] + gate_up_bias[expert]).split(3)
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        hidden = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
        want = weights[token, 0] * (down[expert] @ hidden + down_bias[expert])
        torch.testing.assert_close(out[token], want)


def test_relu_is_the_formula() -> None:
    """Switch: no gate, so the first projection has as many rows as the second has columns."""
    torch.manual_seed(0)
    x, wi, wo = torch.randn(3, 4), torch.randn(2, 5, 4), torch.randn(2, 4, 5)
    ids, weights = torch.tensor([[0], [1], [EMPTY_SLOT]]), torch.rand(3, 1)
    out = reference.experts(x, wi, wo, ids, weights, "relu")
    for token, expert in enumerate([0, 1]):
        hidden = (wi[expert] @ x[token]).clamp(min=0)
        torch.testing.assert_close(out[token], weights[token, 0] * (wo[expert] @ hidden))
    assert (out[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_one_token_without_gradient(backend: str, kind: str, activation: str, biased: bool) -> None:
    """Decoding takes its own path."""
    torch.manual_seed(0)
    ids = routing(kind, 1, 5, 3)
    rows = 4 if activation == "relu" else 8
    arguments = (
        torch.randn(1, 8),
        torch.randn(5, rows, 8),
        torch.randn(5, 8, 4),
        ids,
        torch.rand(1, 3),
        activation,
    )
    if biased:
        arguments += (torch.randn(5, rows), torch.randn(5, 8))
    with torch.no_grad():
        torch.testing.assert_close(BACKENDS[backend](*arguments), reference.experts(*arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_runs_in_bfloat16(backend: str) -> None:
    """Long enough that runs are padded: the padding must add nothing, in either direction."""
    torch.manual_seed(0)
    ids = routing("an idle expert", 600, 4, 2)
    inputs = (
        torch.randn(600, 16),
        torch.randn(4, 32, 16),
        torch.randn(4, 16, 16),
        torch.rand(600, 2),
    )
    upstream = torch.randn(600, 16)
    low = tuple(t.bfloat16() for t in inputs[:3])
    ours = run(BACKENDS[backend], (*low, inputs[3]), ids, upstream.bfloat16())
    truth = run(reference.experts, tuple(t.double() for t in (*low, inputs[3])), ids, upstream.double())
    for mine, true in zip(ours, truth, strict=True):
        assert (mine.double() - true).norm() <= 1e-2 * true.norm()
    assert (ours[2][3] == 0).all()


def test_autocast_multiplies_in_bfloat16() -> None:
    x, gate_up, down = torch.randn(4, 8), torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    ids, weights = torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_mm.experts(x, gate_up, down, ids, weights)
    assert out.dtype == torch.bfloat16


def test_float64_of_whole_rows() -> None:
    """torch's grouped_mm would refuse it."""
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(4, 8), torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    ids, weights = torch.tensor([[0], [1], [0], [1]]), torch.rand(4, 1)
    doubles = [t.double() for t in (x, gate_up, down)]
    out = grouped_mm.experts(*doubles, ids, weights.double())
    torch.testing.assert_close(out, reference.experts(*doubles, ids, weights.double()))
