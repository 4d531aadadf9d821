"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with softmax-routed experts in some or all layers."""

from typing import Any

from tenfold.checkpoint.families.common import (
    BIASES,
    EXPERTS,
    SOME_LAYERS,
    WINDOW,
    WINDOW_LEFT_OUT,
    Family,
    HfReader,
    biases_all_or_none,
    hf_fields,
    renormalizes,
    routes_by_softmax,
    slides_everywhere_or_nowhere,
)
from tenfold.config import ModelConfig


def suits(config: ModelConfig) -> bool:
    return (
        routes_by_softmax(config)
        and config.qk_norm == "head"
        and biases_all_or_none(config)
        and slides_everywhere_or_nowhere(config)
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "qwen3_moe", "Qwen3MoeForCausalLM"),
        "head_dim": config.head_dim,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": renormalizes(config),
        "mlp_only_layers": list(config.mlp_only_layers),
        "decoder_sparse_step": config.decoder_sparse_step,
        "use_sliding_window": config.window(0) is not None,
        "sliding_window": config.window(0),
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    reader.only("partial_rotary_factor", 1)
    return reader.build(
        model_type="qwen3_moe",
        intermediate_size=reader.need("intermediate_size"),
        qk_norm="head",
        **reader.biases(),
        sliding_window=raw.get("sliding_window", WINDOW_LEFT_OUT) if raw.get("use_sliding_window") else None,
        num_experts=reader.need("num_experts", "num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("moe_intermediate_size"),
        norm_topk_prob=reader.need("norm_topk_prob"),
        mlp_only_layers=raw.get("mlp_only_layers") or (),
        decoder_sparse_step=raw.get("decoder_sparse_step", 1),
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    BIASES | EXPERTS | SOME_LAYERS | WINDOW,
    suits,
    to_hf,
    from_hf,
)
