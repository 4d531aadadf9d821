"""OLMoE (arXiv:2409.02060): experts in every layer, QK-norm over all heads at once."""

from typing import Any

from tenfold.checkpoint.families.common import (
    BIASES,
    EXPERTS,
    SOME_LAYERS,
    Family,
    HfReader,
    all_sparse,
    biases_all_or_none,
    has_even_heads,
    hf_fields,
    renormalizes,
    routes_by_softmax,
)
from tenfold.config import ModelConfig


def suits(config: ModelConfig) -> bool:
    return (
        routes_by_softmax(config)
        and all_sparse(config)
        and config.qk_norm == "full"
        and has_even_heads(config)
        and biases_all_or_none(config)
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
    reader.only("clip_qkv")
    reader.only("sliding_window")
    reader.only("partial_rotary_factor", 1)
    return reader.build(
        model_type="olmoe",
        intermediate_size=0,
        head_dim=reader.no_head_dim(),
        qk_norm="full",
        **reader.biases(),
        num_experts=reader.need("num_experts", "num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("intermediate_size"),
        norm_topk_prob=reader.need("norm_topk_prob"),
    )


OLMOE = Family("olmoe", "OlmoeForCausalLM", BIASES | EXPERTS | SOME_LAYERS, suits, to_hf, from_hf)
