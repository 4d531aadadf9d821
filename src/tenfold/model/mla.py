"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are made from one latent of `kv_lora_rank`, and only the latent and one
rotated key are cached. While decoding, the matrices that would expand them are folded into the query
and the output instead, so that no past key or value is ever made.
"""

import torch
from torch import Tensor, nn

from tenfold.config import MLA_NORM_EPS, ModelConfig
from tenfold.model.attend import attend, attend_by_matmul
from tenfold.model.attention import BaseAttention
from tenfold.model.layers import RMSNorm
from tenfold.model.rope import apply_rope, score_scale


class LatentAttention(BaseAttention):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.scale = score_scale(config)
        D, H, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, MLA_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, config.qk_width, bias=False)
        else:
            self.q_proj = nn.Linear(D, config.qk_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, rank + config.qk_rope_head_dim, bias=config.attention_bias)
        self.kv_a_layernorm = RMSNorm(rank, MLA_NORM_EPS)
        self.kv_b_proj = nn.Linear(rank, H * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(config.value_width, D, bias=config.attention_out_bias)

    def project(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value has no width: all that is cached is in the key that heads share."""
        shared = self._shared_key(x_BSD, cos, sin)
        return self._query(x_BSD, cos, sin), shared, shared[..., :0]

    def attend(self, query: Tensor, key: Tensor, _: Tensor, mask: Tensor | None) -> Tensor:
        all_new = key.shape[2] == query.shape[2]
        return (self._attend_expanded if all_new else self._attend_latent)(query, key, mask)

    def _query(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Unrotated part, then rotated: (B, H, S, qk_nope_head_dim + qk_rope_head_dim)."""
        config = self.config
        if config.q_lora_rank:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        else:
            query = self.q_proj(x_BSD)
        query = query.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
        plain, rotated = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        return torch.cat((plain, apply_rope(rotated, cos, sin, config.rope_interleave)), dim=-1)

    def _shared_key(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Latent and rotated key, (B, 1, S, kv_lora_rank + qk_rope_head_dim)."""
        config = self.config
        both = self.kv_a_proj_with_mqa(x_BSD).unsqueeze(1)
        latent, rotated = both.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        key_rope = apply_rope(rotated, cos, sin, config.rope_interleave)
        return torch.cat((self.kv_a_layernorm(latent), key_rope), dim=-1)

    def _attend_expanded(self, query: Tensor, shared: Tensor, mask: Tensor | None) -> Tensor:
        """With every head's own keys and values: fewer operations where all positions are new."""
        config = self.config
        latent, key_rope = shared.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (config.num_attention_heads, -1))
        key, value = expanded.transpose(1, 2).split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        key_rope = key_rope.expand(-1, config.num_attention_heads, -1, -1)
        return attend(query, torch.cat((key, key_rope), dim=-1), value, self.scale, mask)

    def _attend_latent(self, query: Tensor, shared: Tensor, mask: Tensor | None) -> Tensor:
        """In the latent space, where all heads share one key: (q W_k) · c in place of q · (W_k c)."""
        config = self.config
        up = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        key_up, value_up = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        plain, rotated = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        query = torch.cat((plain @ key_up, rotated), dim=-1)
        latent = shared[..., : config.kv_lora_rank]
        out: Tensor = attend_by_matmul(query, shared, latent, self.scale, mask) @ value_up.mT
        return out
