"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with softmax-routed experts in some or all layers."""

from typing import Any

from tenfold.checkpoint.families.common import (
    Family,
    HfReader,
    hf_fields,
    renormalizes,
    routes_by_softmax,
)
from tenfold.checkpoint.families.qwen3 import has_qwen3_attention, refuse_other_attention
from tenfold.config import ModelConfig


def fits(config: ModelConfig) -> bool:
    return routes_by_softmax(config) and has_qwen3_attention(config)


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
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    refuse_other_attention(reader)
    return reader.build(
        model_type="qwen3_moe",
        intermediate_size=reader.need("intermediate_size"),
        head_dim=reader.head_dim(),
        qk_norm="head",
        num_experts=reader.need("num_experts", "num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("moe_intermediate_size"),
        norm_topk_prob=reader.need("norm_topk_prob"),
        mlp_only_layers=raw.get("mlp_only_layers") or (),
        decoder_sparse_step=raw.get("decoder_sparse_step", 1),
    )


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", fits, to_hf, from_hf)
