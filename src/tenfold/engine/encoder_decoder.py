"""Generating with an encoder-decoder: the prompt is read once, and the text is the decoder's."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.engine.kv_cache import LayerKVCache
from tenfold.engine.sampler import Sampler
from tenfold.errors import TenfoldError
from tenfold.model.switch import SwitchTransformer
from tenfold.sampling import SamplingParams

FIRST_CAPACITY = 64


class GrowingKVCache(LayerKVCache):
    """Makes room as it fills: relative positions set no longest text to make room for at once."""

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        capacity = self.key.shape[2]
        if self.length + key.shape[2] > capacity:
            more = max(key.shape[2], capacity)
            self.key, self.value = (F.pad(t, (0, 0, 0, more)) for t in (self.key, self.value))
        return super().update(key, value)


@torch.inference_mode()
def generate_tokens(
    model: SwitchTransformer, prompt_ids: Sequence[int], params: SamplingParams
) -> Iterator[int]:
    """The decoder's tokens, until the end-of-text token (not yielded) or `max_tokens`.

    Spans to fill are sentinel tokens (`<extra_id_0>`, …) of the prompt; the text names each before
    what fills it. Raises TenfoldError for an empty prompt.
    """
    if not prompt_ids:
        raise TenfoldError("the prompt is empty: give at least one token of text")
    config, device = model.config, model.lm_head.weight.device
    memory, _ = model.encode(torch.tensor([list(prompt_ids)], device=device))
    buffer = memory[0].key.new_empty(1, config.num_heads, FIRST_CAPACITY, config.d_kv)
    cache = [GrowingKVCache(buffer.clone(), buffer.clone()) for _ in memory]
    sampler, token = Sampler(params, prompt_ids), config.decoder_start_token_id
    for position in range(params.max_tokens):
        step = torch.tensor([[token]], device=device)
        hidden_BSD, _ = model.decode(step, memory, cache, position)
        token = sampler(model.logits(hidden_BSD[0, -1]))
        if token in config.eos_token_ids and not params.ignore_eos:
            return
        yield token
