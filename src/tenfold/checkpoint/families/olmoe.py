"""OLMoE (arXiv:2409.02060): experts in every layer, QK-norm over all heads at once."""

from typing import Any

from tenfold.checkpoint.families.common import (
    Family,
    HfReader,
    hf_fields,
    renormalizes,
    routes_by_softmax,
)
from tenfold.config import ModelConfig


def fits(config: ModelConfig) -> bool:
    """OLMoE has no head_dim of its own, and its `attention_bias` would bias o_proj too."""
    return (
        routes_by_softmax(config)
        and len(config.sparse_layers) == config.num_hidden_layers
        and config.qk_norm == "full"
        and not config.attention_bias
        and config.partial_rotary_factor == 1
        and config.hidden_size == config.num_attention_heads * config.head_dim
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "olmoe", "OlmoeForCausalLM"),
        "intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": renormalizes(config),
        "clip_qkv": None,
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    reader.only("attention_bias", False)
    reader.only("clip_qkv")
    reader.only("sliding_window")
    reader.only("partial_rotary_factor", 1)
    head_dim = reader.count("hidden_size") // reader.count("num_attention_heads", least=1)
    reader.only("head_dim", head_dim)
    return reader.build(
        model_type="olmoe",
        intermediate_size=0,
        head_dim=head_dim,
        qk_norm="full",
        num_experts=reader.need("num_experts", "num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("intermediate_size"),
        norm_topk_prob=reader.need("norm_topk_prob"),
    )


OLMOE = Family("olmoe", "OlmoeForCausalLM", fits, to_hf, from_hf)
