"""Every backend against the reference, and the reference against float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.kernels import EMPTY_SLOT, grouped_mm, reference

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
    seed: int,
) -> None:
    torch.manual_seed(seed)
    ids = routing(kind, tokens, experts, min(top_k, experts))
    inputs = (
        torch.randn(tokens, hidden),
        torch.randn(experts, 2 * width, hidden),
        torch.randn(experts, hidden, width),
        torch.rand(ids.shape),
    )
    upstream = torch.randn(tokens, hidden)
    ours = run(BACKENDS[backend], inputs, ids, upstream)
    truth = run(reference.experts, tuple(t.double() for t in inputs), ids, upstream.double())
    for mine, true in zip(ours, truth, strict=True):
        assert (mine.double() - true).norm() <= 1e-5 * true.norm() + 1e-12


def run(backend, inputs: tuple[Tensor, ...], ids: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output and the gradients of x, gate_up, down and the weights."""
    x, gate_up, down, weights = (t.clone().requires_grad_() for t in inputs)
    out = backend(x, gate_up, down, ids, weights, "silu")
    out.backward(upstream)
    return [out.detach(), x.grad, gate_up.grad, down.grad, weights.grad]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_token_without_gradient(backend: str, kind: str) -> None:
    """Decoding takes its own path."""
    torch.manual_seed(0)
    ids = routing(kind, 1, 5, 3)
    arguments = (
        torch.randn(1, 8),
        torch.randn(5, 8, 8),
        torch.randn(5, 8, 4),
        ids,
        torch.rand(1, 3),
    )
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
