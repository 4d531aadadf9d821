"""Small parts: RMSNorm, rotary embedding, the dense SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.kernels import swiglu


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019, arXiv:1910.07467. torch computes it in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """Dense feed-forward: gate and up in one matrix of 2F rows, then down."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out


def rope_tables(config: ModelConfig, positions_S: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, rotary_dim / 2) in float32 (Su et al. 2021, arXiv:2104.09864)."""
    exponent = torch.arange(0, config.rotary_dim, 2, device=positions_S.device) / config.rotary_dim
    angles = positions_S[:, None].float() * config.rope_theta**-exponent
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first rotary_dim of each head; x is (B, H, S, head_dim), halves layout as in Hugging Face."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, *rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, *rest), dim=-1)
