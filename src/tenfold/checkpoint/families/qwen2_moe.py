"""Qwen1.5-MoE and Qwen2-MoE (arXiv:2407.10671): biases on q, k and v, one gated shared expert."""

from typing import Any

from tenfold.checkpoint.families.common import (
    EXPERTS,
    SOME_LAYERS,
    WINDOW,
    Family,
    HfReader,
    decoder_map,
    has_even_heads,
    hf_fields,
    renormalizes,
    routes_by_softmax,
    sparse_mlp,
    written_window,
)
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.config import ModelConfig


def suits(config: ModelConfig) -> bool:
    return (
        routes_by_softmax(config)
        and config.qk_norm == "none"
        and has_even_heads(config)
        and config.shared_width > 0
        and config.shared_expert_gate
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "qwen2_moe", "Qwen2MoeForCausalLM"),
        "qkv_bias": config.attention_bias,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.shared_width,
        "norm_topk_prob": renormalizes(config),
        "mlp_only_layers": list(config.mlp_only_layers),
        "decoder_sparse_step": config.decoder_sparse_step,
        **written_window(config),
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    return reader.build(
        model_type="qwen2_moe",
        intermediate_size=reader.need("intermediate_size"),
        head_dim=reader.no_head_dim(),
        qk_norm="none",
        attention_bias=raw.get("qkv_bias", True),
        **reader.optional_window(alternating),
        num_experts=reader.need("num_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("moe_intermediate_size"),
        shared_expert_intermediate_size=reader.need("shared_expert_intermediate_size"),
        shared_expert_gate=True,
        norm_topk_prob=raw.get("norm_topk_prob", False),
        mlp_only_layers=raw.get("mlp_only_layers") or (),
        decoder_sparse_step=raw.get("decoder_sparse_step", 1),
    )


def alternating(layer: int, max_window_layers: int) -> bool:
    """Which layers slide where the config does not list them, as transformers reads it."""
    return layer % 2 == 0 and layer < max_window_layers


def tensor_map(config: ModelConfig) -> SlotMap:
    return decoder_map(config, _sparse)


def _sparse(config: ModelConfig, prefix: str) -> SlotMap:
    slots = {
        name.replace(".shared_experts.", ".shared_expert."): slot
        for name, slot in sparse_mlp(config, prefix).items()
    }
    gate = f"{prefix}.shared_expert_gate.weight"
    return slots | {gate: Slot(gate.removeprefix("model."))}


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    EXPERTS
    | SOME_LAYERS
    | WINDOW
    | {"attention_bias", "n_shared_experts", "shared_expert_intermediate_size", "shared_expert_gate"},
    suits,
    to_hf,
    from_hf,
    tensor_map,
)
