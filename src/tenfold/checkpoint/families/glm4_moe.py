"""GLM-4.5 (arXiv:2508.06471): DeepSeek-V3's router, shared experts, grouped-query attention."""

from collections.abc import Collection
from typing import Any

from tenfold.checkpoint.families import common
from tenfold.checkpoint.families.common import EXPERTS, SOME_LAYERS, Family, HfReader, hf_fields
from tenfold.config import ModelConfig


def suits(config: ModelConfig) -> bool:
    """Dense layers can only come first; the router ranks groups by their two best experts."""
    return (
        config.is_sparse
        and config.router == "sigmoid"
        and config.qk_norm in ("none", "head")
        and config.sparse_layers == list(range(config.sparse_layers[0], config.num_hidden_layers))
        and config.num_experts >= 2
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    fields = hf_fields(config, "glm4_moe", "Glm4MoeForCausalLM")
    fields["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return {
        **fields,
        "partial_rotary_factor": config.partial_rotary_factor,
        "head_dim": config.head_dim,
        "use_qk_norm": config.qk_norm == "head",
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": config.n_shared_experts,
        "first_k_dense_replace": config.sparse_layers[0],
        "norm_topk_prob": config.norm_topk_prob,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": config.routed_scaling_factor,
        "num_nextn_predict_layers": 0,
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    rotary = reader.rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
    return reader.build(
        model_type="glm4_moe",
        intermediate_size=reader.need("intermediate_size"),
        partial_rotary_factor=rotary,
        attention_bias=raw.get("attention_bias", False),
        qk_norm="head" if raw.get("use_qk_norm") else "none",
        router="sigmoid",
        num_experts=reader.need("n_routed_experts", "num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("moe_intermediate_size"),
        n_shared_experts=reader.need("n_shared_experts"),
        mlp_only_layers=tuple(reader.layers()[: reader.count("first_k_dense_replace")]),
        norm_topk_prob=reader.need("norm_topk_prob"),
        n_group=reader.need("n_group"),
        topk_group=reader.need("topk_group"),
        routed_scaling_factor=reader.need("routed_scaling_factor"),
    )


def is_redundant(config: ModelConfig, name: str, names: Collection[str]) -> bool:
    """With the layer that predicts the token after next."""
    return common.in_predictor(config, name, names) or common.is_redundant(config, name)


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    EXPERTS
    | SOME_LAYERS
    | {"attention_bias", "partial_rotary_factor", "n_shared_experts", "n_group", "topk_group"}
    | {"routed_scaling_factor"},
    suits,
    to_hf,
    from_hf,
    is_redundant=is_redundant,
)
