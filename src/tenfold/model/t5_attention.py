"""T5's attention (Raffel et al. 2019, arXiv:1910.10683): unscaled, with a bias by relative position."""

import math

import torch
from torch import Tensor, nn

from tenfold.model.attend import attend
from tenfold.switch_config import SwitchConfig


class RelativePositionBias(nn.Module):
    """One learned number a head for each bucket of distances, shared by all layers of a stack."""

    def __init__(self, config: SwitchConfig, bidirectional: bool):
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_heads))

    def forward(self, new: int, total: int) -> Tensor:
        """What to add to the scores of the last `new` of `total` positions, (1, H, new, total).

        The future is out of sight unless the stack is bidirectional.
        """
        position = torch.arange(total, device=self.weight.device)
        ahead = position - position[total - new :, None]
        bias = self.weight[self.buckets(ahead)].permute(2, 0, 1)[None]
        return bias if self.bidirectional else hide(bias, ahead > 0)

    def buckets(self, ahead: Tensor) -> Tensor:
        """For how far ahead of the query a key is (negative: behind), in [0, number of buckets).

        Half of the buckets are for one distance each, the rest grow with its logarithm up to
        `max_distance`. Looking both ways, each way has half of the buckets.
        """
        if self.bidirectional:
            buckets, distance = len(self.weight) // 2, ahead.abs()
        else:
            buckets, distance = len(self.weight), (-ahead).clamp(min=0)
        exact = buckets // 2
        growth = (distance.clamp(min=exact).float() / exact).log() / math.log(self.max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        found = torch.where(distance < exact, distance, far)
        return found + buckets * (ahead > 0) if self.bidirectional else found


class T5Attention(nn.Module):
    """Over its own sequence or another's: keys and values are made apart from queries."""

    def __init__(self, config: SwitchConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.d_model, config.inner_dim, bias=False)
        self.k = nn.Linear(config.d_model, config.inner_dim, bias=False)
        self.v = nn.Linear(config.d_model, config.inner_dim, bias=False)
        self.o = nn.Linear(config.inner_dim, config.d_model, bias=False)

    def keys_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, T, d_kv) each."""
        return self._heads(self.k(x_BTD)), self._heads(self.v(x_BTD))

    def forward(self, x_BSD: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """`bias` is added to the scores, and broadcasts to (B, H, S, T)."""
        query = self._heads(self.q(x_BSD))
        out = attend(query, key, value, 1.0, bias.to(query.dtype).expand(-1, -1, x_BSD.shape[1], -1))
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads


def hide(bias: Tensor, hidden: Tensor) -> Tensor:
    """`bias` with the least finite number where `hidden`: a row that sees nothing still has a softmax."""
    return bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
