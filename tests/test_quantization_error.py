"""How far quantised weights are from the weights, against llama.cpp's formats and exhaustive search."""

import math

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.panels import pack_matrix, unpack_matrix
from tenfold.quantization import Q4_VALUES, dequantize_mxfp4


def samples(name: str, rows: int = 128, columns: int = 512) -> Tensor:
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((rows, columns)) if name == "gaussian" else rng.standard_t(5, (rows, columns))
    return torch.from_numpy(draws.astype(np.float32))


def packed_and_back(weights: Tensor, form: str, importance: Tensor | None = None) -> Tensor:
    return unpack_matrix(pack_matrix(weights, form, importance), form, *weights.shape)


def relative_error(weights: Tensor, back: Tensor, importance: Tensor | None = None) -> float:
    """Of squares, weighed by column."""
    weight_K = torch.ones(weights.shape[1]) if importance is None else importance
    return float(((weights - back).square() * weight_K).sum() / (weights.square() * weight_K).sum())


def ggml(weights: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Through llama.cpp's own format and rounding, as the gguf package has them."""
    return torch.from_numpy(quants.dequantize(quants.quantize(weights.numpy(), kind), kind))


def iq4_nl(weights: Tensor) -> Tensor:
    """llama.cpp's codebook and scale search: 15 scales around the one that brings the largest to an end."""
    values = torch.tensor(quants.IQ4_NL.kvalues, dtype=torch.float32)
    x = weights.view(-1, 32)
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    best, out = torch.zeros(len(x), 1), torch.zeros_like(x)
    for step in range(-7, 8):
        found = values[(x * (step + values[0]) / largest)[..., None].sub(values).abs().argmin(-1)]
        product, norm = (x * found).sum(1, keepdim=True), found.square().sum(1, keepdim=True)
        gain = product.square() / norm
        out = torch.where(gain > best, (product / norm).half() * found, out)
        best = torch.maximum(gain, best)
    return out.view_as(weights)


@pytest.mark.parametrize("name", ["gaussian", "student"])
def test_q4_beats_the_four_bits_of_llama_cpp(name: str) -> None:
    """Which spend 4.5 bits on a weight, ours 4.25."""
    weights = samples(name)
    error = relative_error(weights, packed_and_back(weights, "q4"))
    assert error < 0.99 * relative_error(weights, iq4_nl(weights))
    assert error < 0.76 * relative_error(weights, ggml(weights, GGMLQuantizationType.Q4_0))


def test_the_scale_search_finds_nearly_the_best_of_all_scales() -> None:
    """Against the nearest of sixteen values in float64 under every scale that the format has.

    Rows have an outlier that leaves smaller and smaller scales to their second block.
    """
    weights = samples("gaussian", 48, 64)
    weights[:, 0] *= 2.0 ** (torch.arange(48) / 4)
    row_scales = 2.0 ** (weights.abs().amax(1, keepdim=True).log2().floor() - 6)
    x = (weights / row_scales).double().view(-1, 32)
    values, least = torch.tensor(Q4_VALUES).double(), torch.full((len(x),), torch.inf)
    for byte in range(256):
        scale = (1 - 2 * (byte >> 7)) * math.ldexp(16 + (byte & 15), (byte >> 4 & 7) - 11)
        nearest = (x[..., None] - scale * values).abs().amin(-1)
        least = torch.minimum(least, nearest.square().sum(1))
    back = packed_and_back(weights, "q4")
    found = (back / row_scales).double().view(-1, 32).sub(x).square().sum(1)
    assert bool((found > least * 0.999999).all())
    assert float(found.sum()) < 1.005 * float(least.sum())


def test_q8_on_gaussian_weights() -> None:
    weights = samples("gaussian")
    assert relative_error(weights, packed_and_back(weights, "q8")) ** 0.5 < 0.006


def test_mxfp4_is_no_worse_than_ggmls() -> None:
    weights = samples("gaussian")
    error = relative_error(weights, packed_and_back(weights, "mxfp4"))
    assert error < relative_error(weights, ggml(weights, GGMLQuantizationType.MXFP4))


@pytest.mark.parametrize(("form", "most"), [("q4", 0.95), ("mxfp4", 0.995)])
def test_importance_moves_the_error_to_where_it_matters_less(form: str, most: float) -> None:
    weights, importance = samples("gaussian"), samples("student", 1)[0].exp()
    plain, weighed = packed_and_back(weights, form), packed_and_back(weights, form, importance)
    assert relative_error(weights, weighed, importance) < most * relative_error(weights, plain, importance)
    assert torch.equal(packed_and_back(weights, form, torch.full((512,), 3.0)), plain)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), low=st.integers(0, 240), spread=st.integers(1, 12))
def test_weights_that_were_mxfp4_stay(seed: int, low: int, spread: int) -> None:
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (20, 3, 16), dtype=torch.uint8, generator=random)
    blocks[: seed % 20] &= 0b10010001  # only the smallest values
    scales = torch.randint(spread, (20, 3), dtype=torch.uint8, generator=random) + low
    weights = dequantize_mxfp4(blocks, scales).mT.contiguous()
    assert torch.equal(packed_and_back(weights, "mxfp4"), weights)
