"""Choosing tokens, against transformers' processors and loops in float64."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from tenfold.engine.sampler import Sampler, check_params, draw, logprob, logprobs
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams


def random_logits(vocab: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def sampler_of(prompt: tuple[int, ...] = (), **params: object) -> Sampler:
    return Sampler(SamplingParams(**params), prompt)


def kept(logits_V: torch.Tensor, **params: object) -> np.ndarray:
    """The probability of each token."""
    weights_C, ids_C = sampler_of(**params).candidates(logits_V.numpy())
    probs_V = np.zeros(len(logits_V))
    probs_V[slice(None) if ids_C is None else ids_C] = weights_C / weights_C.sum(dtype=np.float64)
    return probs_V


def test_filters_of_a_known_distribution() -> None:
    halves = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert kept(halves) == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert kept(halves, top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept(halves, top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert kept(halves, top_p=0.01) == pytest.approx([1, 0, 0, 0])
    assert kept(halves, min_p=0.29) == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0])
    hot = [p**0.5 for p in (0.5, 0.25, 0.15, 0.1)]
    assert kept(halves, temperature=2.0) == pytest.approx([p / sum(hot) for p in hot])


FILTERS = {
    "temperature": st.floats(0.3, 5),
    "top_k": st.none() | st.integers(1, 6000),
    "top_p": st.floats(0.01, 1),
    "min_p": st.floats(0, 1),
}


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([1, 7, 513, 5000]),
    st.integers(0, 1000),
    st.floats(0.1, 10),
    st.fixed_dictionaries(FILTERS),
)
def test_filters_are_those_of_transformers(
    vocab: int, seed: int, spread: float, params: dict[str, float | None]
) -> None:
    logits_V = random_logits(vocab, seed, spread)
    processors = LogitsProcessorList([theirs.TemperatureLogitsWarper(params["temperature"])])
    if params["top_k"]:
        processors.append(theirs.TopKLogitsWarper(params["top_k"]))
    processors.append(theirs.TopPLogitsWarper(params["top_p"]))
    processors.append(theirs.MinPLogitsWarper(params["min_p"]))
    wanted = processors(None, logits_V.double()[None])[0].softmax(-1).numpy()
    # Rounding may decide of the last token that is kept.
    assert np.abs(kept(logits_V, **params) - wanted).sum() < 2e-4 + 3 * wanted[wanted > 0].min()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-500, 500).map(lambda tenths: tenths / 10), min_size=1, max_size=30),
    st.fixed_dictionaries({**FILTERS, "temperature": st.floats(0, 100, exclude_min=True)}),
)
def test_whatever_the_filters_the_likeliest_stays(logits: list[float], params: dict[str, float]) -> None:
    probs = kept(torch.tensor(logits), **params).tolist()
    assert sum(probs) == pytest.approx(1)
    likeliest = [prob for prob, logit in zip(probs, logits, strict=True) if logit == max(logits)]
    assert max(probs) == max(likeliest)  # of equals any may stay


def test_many_equal_tokens_are_cut_to_the_share_asked_for() -> None:
    assert np.count_nonzero(kept(torch.zeros(10_000), top_p=0.25)) == 2500
    assert np.count_nonzero(kept(torch.zeros(10_000), top_k=30)) == 30


@settings(deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 19)),
    st.lists(st.integers(0, 19)),
    st.fixed_dictionaries(
        {
            "repetition_penalty": st.floats(0.01, 100),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, 19).map(str), st.floats(-100, 100)),
        }
    ),
)
def test_penalties(seed: int, prompt: list[int], text: list[int], params: dict[str, object]) -> None:
    """Repetition against transformers, the others against OpenAI's formula."""
    sampler, logits_V = sampler_of(tuple(prompt), temperature=0, **params), random_logits(20, seed)
    for token in text:  # generated, whatever bias and penalties
        assert sampler(torch.full((20,), -1e30).index_fill(0, torch.tensor(token), 1e30)) == token
    wanted = logits_V.double()
    for token, bias in params["logit_bias"].items():
        wanted[int(token)] += bias
    if seen := [*prompt, *text]:
        repetition = theirs.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])
        wanted = repetition(torch.tensor([seen]), wanted[None])[0]
    for token, count in Counter(text).items():
        wanted[token] -= params["presence_penalty"] + count * params["frequency_penalty"]
    ours = sampler.adjusted(logits_V.numpy())
    assert ours == pytest.approx(wanted.numpy(), rel=1e-5, abs=1e-4)
    assert sampler(logits_V) == ours.argmax()


def test_greedy_hears_bias_and_penalties() -> None:
    logits_V = torch.tensor([3.0, 2.0, 1.0])
    assert sampler_of(temperature=0, logit_bias={"2": 5})(logits_V) == 2
    sampler = sampler_of(temperature=0, presence_penalty=1.5)
    assert [sampler(logits_V) for _ in range(3)] == [0, 1, 0]
    assert sampler_of((0,), temperature=0, repetition_penalty=2)(logits_V) == 1
    assert logits_V.tolist() == [3, 2, 1]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.25, 1.0]), min_size=1, max_size=2000).filter(any),
    st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, math.nextafter(1, 0)]),
)
def test_a_draw_is_the_inverse_of_the_distribution(weights: list[float], uniform: float) -> None:
    weights_C = np.array(weights, np.float32)
    drawn, sums = draw(weights_C, uniform), np.cumsum(weights_C, dtype=np.float64) / sum(weights)
    assert weights_C[drawn] > 0
    assert (sums[drawn - 1] if drawn else 0) - 1e-6 <= 1 - uniform <= sums[drawn] + 1e-6


def test_frequencies_are_the_probabilities() -> None:
    logits_V = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(300) - math.log(300)
    sampler = sampler_of(seed=0)
    counts = np.bincount([sampler(logits_V) % 4 for _ in range(10_000)])
    assert counts / 10_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)


def test_seeds() -> None:
    """Text i of a request is the only text of one with that much more as its seed."""
    logits = [random_logits(2000, step) for step in range(20)]

    def text(seed: int | None, index: int = 0) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, top_p=0.9), (), index)
        tokens = []
        for logits_V in logits:
            tokens.append(sampler(logits_V))
            torch.rand(3)
        return tokens

    assert text(3) == text(3) == text(1, 2) != text(1)
    assert text(None) != text(None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_damaged_logits_are_refused(bad: float, temperature: float) -> None:
    with pytest.raises(TenfoldError, match="NaN or infinite"):
        sampler_of(temperature=temperature)(torch.tensor([0.0, bad, 1.0]))


def test_extremes_are_no_damage() -> None:
    logits_V = torch.tensor([-math.inf, 1e30, -1e30, 0.0])
    for params in (
        {"temperature": 5e-324},
        {"temperature": 0},
        {"min_p": 1.0},
        {"temperature": 100},
        {"top_p": 1 - 1e-16},
    ):
        assert sampler_of(**params)(logits_V) == 1


def test_logprobs_are_the_models_own() -> None:
    logits_TV = torch.stack([random_logits(3000, seed) for seed in range(3)])
    tokens = [5, 2999, 0]
    told = logprobs(logits_TV, tokens, 4)
    for row, token, ours in zip(logits_TV, tokens, told, strict=True):
        wanted = row.double().log_softmax(-1)
        assert ours == logprob(row, token, 4)
        assert (ours.token, ours.logprob) == (token, pytest.approx(float(wanted[token]), abs=1e-5))
        best = wanted.sort(descending=True)
        assert [token for token, _ in ours.top] == best.indices[:4].tolist()
        assert [value for _, value in ours.top] == pytest.approx(best.values[:4].tolist(), abs=1e-5)
    assert logprob(logits_TV[0], 1, 0).top == ()
    assert len(logprob(torch.zeros(3), 1, 20).top) == 3


def test_tokens_that_the_model_does_not_have() -> None:
    check_params(SamplingParams(logit_bias={"9": 1}, stop_token_ids=[9]), 10)
    with pytest.raises(TenfoldError, match="logit_bias: 10 is no token"):
        check_params(SamplingParams(logit_bias={"10": 1}), 10)
    with pytest.raises(TenfoldError, match="stop_token_ids: 10 is no token"):
        check_params(SamplingParams(stop_token_ids=[10]), 10)
