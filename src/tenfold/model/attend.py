"""softmax(q·k) v: the one place that scores positions, whichever attention asks."""

import torch
import torch.nn.functional as F
from torch import Tensor

MATMUL_LENGTH = 256
"""On the CPU in bf16, attention written out is 1.5 to 3 times as fast as torch's flash kernel up to
this length; beyond it the scores that causality throws away cost more than they save (LOG.md)."""

MAX_SCORES = 1 << 26
"""Attention written out takes as many queries at a time as keep this many scores in memory."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of the last S positions over all T. Returns (B, H, S, value width).

    query is (B, H, S, d), key (B, H_kv, T, d), value (B, H_kv, T, value width). `mask` is as
    `visible` makes it, or a bias to add to the scores, (B, H, S, T); None is causal.
    """
    new, total = query.shape[2], key.shape[2]
    in_bf16_on_cpu = query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if sinks_H is not None or (in_bf16_on_cpu and new == total <= MATMUL_LENGTH):
        return attend_by_matmul(query, key, value, scale, mask, sinks_H)
    causal = mask is None and new == total > 1
    if mask is None and 1 < new < total:
        mask = _causal(new, total, query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_by_matmul(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`attend` as two products and a softmax, some queries at a time. Keys are never repeated."""
    if mask is None:
        mask = _causal(query.shape[2], key.shape[2], query.device)
    at_once = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    if query.shape[2] <= at_once:
        return _block(query, key, value, scale, mask, sinks_H)
    blocks = zip(query.split(at_once, 2), mask.split(at_once, -2), strict=True)
    return torch.cat([_block(q, key, value, scale, m, sinks_H) for q, m in blocks], dim=2)


def _block(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor, sinks_H: Tensor | None
) -> Tensor:
    """Query heads that share a key head are stacked along its positions: (B, H_kv, shared * S, d)."""
    heads, new = query.shape[1], query.shape[2]
    stacked = (query * scale).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (stacked @ key.mT).unflatten(2, (-1, new)).flatten(1, 2)
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    if sinks_H is not None:
        sinks = sinks_H[:, None, None].to(scores.dtype).expand(len(scores), heads, new, 1)
        probs = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    stacked_out = probs.unflatten(1, (key.shape[1], -1)).flatten(2, 3) @ value
    out: Tensor = stacked_out.unflatten(2, (-1, new)).flatten(1, 2)
    return out


def visible(
    new: int, total: int, window: int | None, real_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """True where one of the last `new` positions may look, (new, total) or (B, 1, new, total).

    None where that is plain causality. `real_BT` is False at padding, which sees itself alone:
    a row that may look nowhere would have no softmax.
    """
    sliding = window is not None and window < total
    if real_BT is None and not sliding:
        return None
    allowed = _causal(new, total, device)
    if sliding:
        assert window is not None
        allowed = allowed.triu(diagonal=total - new - window + 1)
    if real_BT is None:
        return allowed
    itself = torch.eye(total, dtype=torch.bool, device=device)[-new:]
    return (allowed & real_BT[:, None, None, :]) | itself


def _causal(new: int, total: int, device: torch.device) -> Tensor:
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(diagonal=total - new)
