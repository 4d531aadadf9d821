"""Choosing the next token from logits."""

import torch
from torch import Tensor

from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams


class Sampler:
    """Draws tokens as `params` say, from its own random generator."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self.generator = torch.Generator()
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """A token. Raises TenfoldError for logits that are NaN or infinite: any would look plausible."""
        if not logits_V.max().isfinite():
            raise TenfoldError(
                "the model's logits are NaN or infinite: its weights are damaged, or too large"
            )
        if self.params.temperature == 0:
            return int(logits_V.argmax())
        probs_V = self.probabilities(logits_V.float().cpu())
        return int(torch.multinomial(probs_V, 1, generator=self.generator))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Temperature, then top-k, top-p and min-p, each on what the one before left; sums to one.

        The likeliest token always stays.
        """
        logits_V = logits_V - logits_V.max()
        probs, ids = (logits_V / self.params.temperature).softmax(-1).sort(descending=True, stable=True)
        if self.params.top_k:
            probs[self.params.top_k :] = 0
        probs = probs / probs.sum()
        before = probs.cumsum(-1) - probs
        probs[1:][before[1:] >= self.params.top_p] = 0
        probs[probs < self.params.min_p * probs[0]] = 0
        return torch.zeros_like(logits_V).scatter(0, ids, probs / probs.sum())
