"""Small parts: RMSNorm and the dense SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def __init__(self, hidden_size: int, width: int, bias: bool = False):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=bias)
        self.down = nn.Linear(width, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out
