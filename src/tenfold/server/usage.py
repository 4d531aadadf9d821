"""The meter in every answer."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from tenfold.engine.request import Costs, Meter, ModelFacts, describe
from tenfold.server.cost import Prices, costs


def usage(
    meters: Sequence[Meter], prompt_tokens: int, completion_tokens: int, facts: ModelFacts, prices: Prices
) -> dict[str, Any]:
    """OpenAI's counts, and under `tenfold` what sparsity and the operator's prices say of them."""
    meter = together(meters)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": meter.cached_tokens},
        "tenfold": {
            "active_parameters": facts.num_active_params,
            "total_parameters": facts.num_params,
            **describe(meter),
            "queue_seconds": meter.queue_seconds,
            "first_token_seconds": meter.first_token_seconds,
            **costs(meter, prompt_tokens, completion_tokens, prices),
        },
    }


def together(meters: Sequence[Meter]) -> Meter:
    """Of several prompts in one request: costs add up. Nobody counted which experts they had in common, so
    `distinct_experts` is that of the prompt with the most; waiting times are the longest too."""
    if len(meters) == 1:
        return meters[0]
    first = [m.first_token_seconds for m in meters if m.first_token_seconds is not None]
    return Meter(
        prompt=_sum([m.prompt for m in meters]),
        decode=_sum([m.decode for m in meters]),
        cached_tokens=sum(m.cached_tokens for m in meters),
        distinct_experts=max(m.distinct_experts for m in meters),
        queue_seconds=max(m.queue_seconds for m in meters),
        first_token_seconds=max(first, default=None),
        drafted=sum(m.drafted for m in meters),
        accepted=sum(m.accepted for m in meters),
    )


def _sum(parts: Sequence[Costs]) -> Costs:
    return Costs(*(sum(getattr(part, f.name) for part in parts) for f in fields(Costs)))
