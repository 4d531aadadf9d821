"""The matrix that would expand latents to keys and values, as what queries and outputs meet instead."""

import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.packed import PackedMatrix
from tenfold.panels import pack_matrix, unpack_matrix


def folded(kv_b: PackedMatrix, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Panels in bf16, every head's after the one before: from a head's query (without what RoPE turns) to the
    latent space, (rank, qk_nope_head_dim), and from there to its output, (v_head_dim, rank).

    bf16 whatever `kv_b` is in: the first is its transpose, which has no blocks of shared scales.
    """
    up = unpack_matrix(kv_b.panels, kv_b.format, kv_b.rows, kv_b.columns)
    up_HwR = up.unflatten(0, (config.num_attention_heads, -1))
    key_HwR, value_HwR = up_HwR.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    key_up, value_up = (
        torch.cat([pack_matrix(head, "bf16") for head in heads]) for heads in (key_HwR.mT, value_HwR)
    )
    return key_up, value_up
