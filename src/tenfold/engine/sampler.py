"""Choosing the next token from logits, and telling what the model itself thought of it.

A vocabulary has up to 200,000 tokens and a batch a sampler for each sequence, so nothing here sorts it whole.
NumPy does most of it, several times as fast as torch on vectors of this size.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tenfold.engine.constraint import Matcher
from tenfold.engine.request import Logprob
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

COLDEST = 1e-6  # as a temperature: colder ones divide by what float32 takes for zero
BLOCK = 512  # weights that `draw` adds up at once
BINS = 1000


class Sampler:
    """Draws the tokens of one text as `params` say.

    Each token takes one number of its own generator: with a seed the same logits give the same tokens,
    whatever else runs.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        index: int = 0,
        constraint: Matcher | None = None,
    ):
        """For text `index` of those made of one prompt: it draws with seed + index."""
        self.params, self.constraint = params, constraint
        self._random = random.Random(None if params.seed is None else params.seed + index)
        self._penalties = _Penalties(params, prompt_ids) if _penalises(params) else None
        self._biased = np.array([int(token) for token in params.logit_bias], np.intp)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing but its end may follow."""
        return self.constraint is not None and self.constraint.done

    def __call__(self, logits_V: Tensor) -> int:
        """A token, which counts as generated from now on.

        Raises TenfoldError for logits that are NaN or infinite (any token would look plausible), and where
        the constraint does.
        """
        own_V = logits_V.float().cpu().numpy()
        if not np.isfinite(own_V.max()):
            raise TenfoldError(
                "the model's logits are NaN or infinite: its weights are damaged, or too large"
            )
        adjusted_V = self.adjusted(own_V)
        if self.params.temperature == 0:
            token = int(adjusted_V.argmax())
        else:
            weights_C, ids_C = self.candidates(adjusted_V)
            drawn = draw(weights_C, self._random.random())
            token = drawn if ids_C is None else int(ids_C[drawn])
        if self._penalties:
            self._penalties.count(token)
        if self.constraint:
            self.constraint.advance(token)
        return token

    def adjusted(self, logits_V: Floats) -> Floats:
        """With bias, penalties and the constraint; the same array where there are none of these."""
        if self._biased.size or self._penalties:
            logits_V = logits_V.copy()
            logits_V[self._biased] += self._bias
        if self._penalties:
            self._penalties.apply(logits_V)
        if self.constraint:
            logits_V = np.where(self.constraint.mask(), logits_V, np.float32(-np.inf))
        return logits_V

    def candidates(self, logits_V: Floats) -> tuple[Floats, Ids | None]:
        """Tokens to draw from, and their weights, of which the largest is 1: temperature, then top-k, top-p
        and min-p, each on what the one before left.

        Ids are None where all tokens are candidates.
        """
        params = self.params
        weights_C: Floats = logits_V - logits_V.max()
        weights_C *= np.float32(1 / max(params.temperature, COLDEST))
        np.exp(weights_C, out=weights_C)
        ids_C: Ids | None = None
        for asked, choose in (
            (params.top_k is not None and params.top_k < len(weights_C), self._top_k),
            (params.top_p < 1, self._top_p),
            (params.min_p > 0, self._min_p),
        ):
            if asked:
                kept = choose(weights_C)
                weights_C, ids_C = weights_C[kept], kept if ids_C is None else ids_C[kept]
        return weights_C, ids_C

    def _top_k(self, weights_C: Floats) -> Ids:
        assert self.params.top_k
        ids_K: Ids = torch.from_numpy(weights_C).topk(self.params.top_k, sorted=False).indices.numpy()
        return ids_K

    def _top_p(self, weights_C: Floats) -> Ids:
        """The fewest largest that hold `top_p` of the sum.

        What is below the C-th part of what may be left out cannot be among them: all that is so small makes
        up less. The others are added up in bins by size, and only the bin that reaches the sum is sorted.
        """
        total = float(weights_C.sum(dtype=np.float64))
        wanted = total * self.params.top_p
        least = max((total - wanted) / len(weights_C), 1e-38)  # above zero: it has a logarithm
        found = np.flatnonzero(weights_C >= least)
        depths = -np.log(weights_C[found])
        bins = (depths * (BINS / max(float(depths.max()), 1e-30))).astype(np.intp)
        sums = np.bincount(bins, weights_C[found]).cumsum()
        last = min(int(sums.searchsorted(wanted)), len(sums) - 1)
        unsure = found[bins == last]
        weights, order = torch.from_numpy(weights_C[unsure]).sort(descending=True, stable=True)
        before = sums[last - 1] if last else 0
        count = int(weights.numpy().cumsum(dtype=np.float64).searchsorted(wanted - before)) + 1
        return np.concatenate([found[bins < last], unsure[order.numpy()[:count]]])

    def _min_p(self, weights_C: Floats) -> Ids:
        return np.flatnonzero(weights_C >= self.params.min_p)


def draw(weights_C: Floats, uniform: float) -> int:
    """An index with a probability in proportion to its weight, from a number in [0, 1).

    Never one of weight zero: it is the first whose running sum reaches a share, above zero, of the whole.
    The sum runs over blocks first, because most of them need not be looked into.
    """
    whole = len(weights_C) // BLOCK * BLOCK
    blocks = weights_C[:whole].reshape(-1, BLOCK).sum(1)
    sums = np.append(blocks, weights_C[whole:].sum()).cumsum(dtype=np.float64)
    share = sums[-1] * (1 - uniform)
    block = int(sums.searchsorted(share))
    inside = weights_C[block * BLOCK :][:BLOCK].cumsum(dtype=np.float64)
    rest = share - (sums[block - 1] if block else 0)
    return block * BLOCK + int(inside.searchsorted(min(rest, inside[-1])))


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class _Penalties:
    """Counts tokens, and takes it out on their logits."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params, self._prompt = params, list(prompt_ids)
        self._counts_V = np.zeros(0, np.float32)
        self._seen_V = np.zeros(0, bool)

    def count(self, token: int) -> None:
        self._counts_V[token] += 1
        self._seen_V[token] = True

    def apply(self, logits_V: Floats) -> None:
        """In place. Repetition is of prompt and text, as Hugging Face has it (arXiv:1909.05858), presence
        and frequency of the text alone, as OpenAI has them."""
        if not self._seen_V.size:
            self._counts_V, self._seen_V = np.zeros_like(logits_V), np.zeros(len(logits_V), bool)
            self._seen_V[self._prompt] = True
        params = self._params
        if params.repetition_penalty != 1:
            ids = np.flatnonzero(self._seen_V)
            seen, penalty = logits_V[ids], np.float32(params.repetition_penalty)
            logits_V[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
        if params.presence_penalty or params.frequency_penalty:
            ids = np.flatnonzero(self._counts_V)
            counts, each = self._counts_V[ids], np.float32(params.frequency_penalty)
            logits_V[ids] -= counts * each + np.float32(params.presence_penalty)


def logprob(logits_V: Tensor, token: int, top: int) -> Logprob:
    """What the model gave `token`, and its `top` likeliest; in float32."""
    logits_V = logits_V.float()
    total = logits_V.logsumexp(-1)
    best = logits_V.topk(min(top, len(logits_V))) if top else None
    likeliest = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True) if best else ()
    return Logprob(token, float(logits_V[token] - total), tuple(likeliest))


def logprobs(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """The same of many positions, a row at a time: all log-probabilities at once would double the logits."""
    return [logprob(row, token, top) for row, token in zip(logits_TV, tokens, strict=True)]


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises TenfoldError, naming the field, for token ids that the model does not have."""
    named = {"logit_bias": map(int, params.logit_bias), "stop_token_ids": params.stop_token_ids}
    for field, ids in named.items():
        for token in ids:
            if token >= vocab_size:
                raise TenfoldError(f"{field}: {token} is no token: the model's are 0 to {vocab_size - 1}")
