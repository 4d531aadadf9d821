"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and how it is stretched."""

import math

import torch
from torch import Tensor

from tenfold.config import ModelConfig, RopeScaling


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines in float32, scaled as YaRN asks.

    (S, rotary_dim / 2) for positions (S,); (B, 1, S, rotary_dim / 2) for positions (B, S).
    """
    angles = positions[..., None].float() * _frequencies(config, positions.device)
    if positions.ndim == 2:
        angles = angles[:, None]
    factor = _attention_factor(config.rope_scaling) if config.rope_scaling else 1.0
    if factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = False) -> Tensor:
    """Turn the first rotary_dim of each head of x (B, H, S, head_dim).

    A pair is a dimension and the one half a head on, as in Hugging Face; with `interleave` it is two
    neighbours, and they leave in the order of halves (the same permutation for q and k).
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if interleave:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    first, second, *rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, *rest), dim=-1)


def score_scale(config: ModelConfig) -> float:
    """What q·k is multiplied by. DeepSeek's YaRN sharpens it by `mscale_all_dim` (arXiv:2405.04434)."""
    width = config.qk_nope_head_dim + config.head_dim
    scale = config.attention_multiplier or width**-0.5
    scaling = config.rope_scaling
    if config.is_latent and scaling is not None and scaling.mscale_all_dim:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    exponent = torch.arange(0, config.rotary_dim, 2, device=device) / config.rotary_dim
    freq = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.rope_type == "linear":
        return freq / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(freq, scaling)
    return _yarn(freq, scaling, config.rotary_dim, config.rope_theta)


def _llama3(freq: Tensor, scaling: RopeScaling) -> Tensor:
    """High frequencies as they are, low ones divided, a ramp between (Llama 3.1, arXiv:2407.21783)."""
    turns = _trained_context(scaling) * freq / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return freq * ramp + freq / scaling.factor * (1 - ramp)


def _yarn(freq: Tensor, scaling: RopeScaling, dim: int, theta: float) -> Tensor:
    """The same with a ramp over dimensions, between beta_fast and beta_slow turns of the old context."""

    def dimension(turns: float) -> float:
        context = _trained_context(scaling)
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the authors' code
    ramp = (torch.arange(len(freq), device=freq.device) - low) / (high - low)
    ramp = ramp.clamp(0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _trained_context(scaling: RopeScaling) -> int:
    assert scaling.original_max_position_embeddings is not None  # RopeScaling checks it
    return scaling.original_max_position_embeddings
