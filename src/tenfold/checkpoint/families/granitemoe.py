"""IBM Granite 3 MoE: Mixtral's layers with multipliers on embedding, attention, residual and logits.

Source of the fields: https://huggingface.co/ibm-granite/granite-3.0-1b-a400m-base config.json.
"""

from typing import Any

from tenfold.checkpoint.families.common import (
    BIASES,
    EXPERTS,
    Family,
    HfReader,
    all_sparse,
    biases_all_or_none,
    decoder_map,
    has_even_heads,
    hf_fields,
    ours,
    renormalizes,
    routes_by_softmax,
)
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.config import ModelConfig

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def suits(config: ModelConfig) -> bool:
    return (
        routes_by_softmax(config)
        and renormalizes(config)
        and all_sparse(config)
        and config.qk_norm == "none"
        and has_even_heads(config)
        and biases_all_or_none(config)
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "granitemoe", "GraniteMoeForCausalLM"),
        "intermediate_size": config.moe_intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "attention_multiplier": config.attention_multiplier or config.head_dim**-0.5,
        **{name: getattr(config, name) for name in MULTIPLIERS},
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    return reader.build(
        model_type="granitemoe",
        intermediate_size=0,
        head_dim=reader.no_head_dim(),
        qk_norm="none",
        **reader.biases(),
        attention_multiplier=raw.get("attention_multiplier", 1.0),
        **{name: raw.get(name, 1.0) for name in MULTIPLIERS},
        router="topk_softmax",
        num_experts=reader.need("num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("intermediate_size"),
    )


def tensor_map(config: ModelConfig) -> SlotMap:
    return decoder_map(config, _sparse, mlp="block_sparse_moe")


def _sparse(_: ModelConfig, prefix: str) -> SlotMap:
    """Experts are published stacked, as ours are."""
    mlp = ours(prefix)
    return {
        f"{prefix}.router.layer.weight": Slot(f"{mlp}.router.weight"),
        f"{prefix}.input_linear.weight": Slot(f"{mlp}.experts.gate_up"),
        f"{prefix}.output_linear.weight": Slot(f"{mlp}.experts.down"),
    }


GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    EXPERTS | BIASES | {"attention_multiplier", *MULTIPLIERS},
    suits,
    to_hf,
    from_hf,
    tensor_map,
)
