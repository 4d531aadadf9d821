"""Choosing the next token from logits, and telling what the model itself thought of it.

A vocabulary has up to 200,000 tokens and a batch a sampler for each sequence, so nothing here sorts it whole.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.engine.constraint import Matcher
from tenfold.engine.request import Logprob
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams

COLDEST = 1e-6  # as a temperature: colder ones divide by what float32 takes for zero


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
        self._bias = (
            torch.tensor([int(token) for token in params.logit_bias], dtype=torch.long),
            torch.tensor(list(params.logit_bias.values()), dtype=torch.float32),
        )

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing but its end may follow."""
        return self.constraint is not None and self.constraint.done

    def __call__(self, logits_V: Tensor) -> int:
        """A token, which counts as generated from now on.

        Raises TenfoldError for logits that are NaN or infinite: any token would look plausible.
        """
        logits_V = logits_V.float().cpu()
        best, token = logits_V.max(-1)
        if not best.isfinite():
            raise TenfoldError(
                "the model's logits are NaN or infinite: its weights are damaged, or too large"
            )
        adjusted_V = self.adjusted(logits_V)
        if adjusted_V is not logits_V:
            best, token = adjusted_V.max(-1)
        if self.params.temperature > 0:
            weights_C, ids_C = self.candidates(adjusted_V - best)
            drawn = draw(weights_C, self._random.random())
            return self._record(drawn if ids_C is None else int(ids_C[drawn]))
        return self._record(int(token))

    def _record(self, token: int) -> int:
        if self._penalties:
            self._penalties.count(token)
        if self.constraint:
            self.constraint.advance(token)
        return token

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """With bias, penalties and the constraint; the same tensor where there are none of these."""
        if not (self.params.logit_bias or self._penalties or self.constraint):
            return logits_V
        logits_V = logits_V.clone()
        logits_V.index_add_(0, *self._bias)
        if self._penalties:
            self._penalties.apply(logits_V)
        if self.constraint:
            logits_V.masked_fill_(~self.constraint.mask(), -torch.inf)
        return logits_V

    def candidates(self, logits_V: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens to draw from, and their weights: temperature, then top-k, top-p and min-p, each on what
        the one before left. The largest of `logits_V` must be zero.

        Ids are None where all tokens are candidates.
        """
        params = self.params
        weights_C, ids_C = (logits_V / max(params.temperature, COLDEST)).exp_(), None
        if params.top_k and params.top_k < len(weights_C):
            weights_C, ids_C = weights_C.topk(params.top_k)
        if params.top_p < 1:
            weights_C, kept = nucleus(weights_C, params.top_p)
            ids_C = kept if ids_C is None else ids_C[kept]
        if params.min_p:
            weights_C = weights_C.masked_fill(weights_C < params.min_p, 0)  # the largest is 1
        return weights_C, ids_C


def nucleus(weights_C: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest largest weights that hold `top_p` of the sum, largest first, and where they were.

    What is below (1 - top_p) / C of the sum cannot be among them: all that is so small makes up less than
    1 - top_p together. What is left to sort is mostly a small part of a vocabulary.
    """
    total = weights_C.sum(dtype=torch.float64)
    found = (weights_C >= total * (1 - top_p) / len(weights_C)).nonzero()[:, 0]
    weights, order = weights_C[found].sort(descending=True, stable=True)
    sums = weights.cumsum(0, dtype=torch.float64)
    count = int(torch.searchsorted(sums, total * top_p)) + 1
    return weights[:count], found[order[:count]]


def draw(weights_C: Tensor, uniform: float) -> int:
    """An index with a probability in proportion to its weight, from a number in [0, 1).

    Never one of weight zero: it is the first whose running sum reaches a share, above zero, of the whole.
    """
    sums = weights_C.cumsum(0, dtype=torch.float64)
    return int(torch.searchsorted(sums, sums[-1] * (1 - uniform)))


def _penalises(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class _Penalties:
    """Counts tokens, and takes it out on their logits."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._params, self._prompt = params, torch.tensor(prompt_ids, dtype=torch.long)
        self._counts_V: Tensor | None = None

    def count(self, token: int) -> None:
        assert self._counts_V is not None
        self._counts_V[token] += 1
        self._seen_V[token] = True

    def apply(self, logits_V: Tensor) -> None:
        """In place. Repetition is of prompt and text, as Hugging Face has it (arXiv:1909.05858), presence
        and frequency of the text alone, as OpenAI has them."""
        if self._counts_V is None:
            self._counts_V = torch.zeros_like(logits_V)
            self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
            self._seen_V[self._prompt] = True
        params, penalty = self._params, self._params.repetition_penalty
        if penalty != 1:
            ids = self._seen_V.nonzero()[:, 0]
            seen = logits_V[ids]
            logits_V[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)
        if params.presence_penalty:
            logits_V.sub_((self._counts_V > 0).float(), alpha=params.presence_penalty)
        if params.frequency_penalty:
            logits_V.sub_(self._counts_V, alpha=params.frequency_penalty)


def logprob(logits_V: Tensor, token: int, top: int) -> Logprob:
    """What the model gave `token`, and its `top` likeliest; in float32."""
    logits_V = logits_V.float()
    total = logits_V.logsumexp(-1)
    best = (logits_V.topk(min(top, len(logits_V)))) if top else None
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
