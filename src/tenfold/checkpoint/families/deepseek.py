"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437): latent attention, shared experts.

V2 routes by softmax, V3 by sigmoid with a selection bias, and V3 may carry a module that predicts one
token further, stored as one more layer.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from tenfold.checkpoint.families import common
from tenfold.checkpoint.families.common import (
    BIASES,
    EXPERTS,
    SOME_LAYERS,
    Family,
    HfReader,
    Sparse,
    biases_all_or_none,
    hf_fields,
    layer_map,
    shares_out_evenly,
    sparse_mlp,
)
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.config import ModelConfig

LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
OPTIONS = (
    EXPERTS
    | SOME_LAYERS
    | BIASES
    | {"n_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "rope_interleave", *LATENT}
)


_V3_DEFAULTS = {
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
}
"""What transformers takes for a field that is left out, where a wrong guess would go unnoticed."""


def suits(config: ModelConfig) -> bool:
    """Latent attention, and dense layers only at the bottom."""
    return (
        config.is_sparse
        and config.is_latent
        and biases_all_or_none(config)
        and config.sparse_layers == list(range(config.sparse_layers[0], config.num_hidden_layers))
    )


def v2_suits(config: ModelConfig) -> bool:
    routes = config.router == "softmax" and not config.norm_topk_prob
    return suits(config) and shares_out_evenly(config) and routes and config.rope_interleave


def v3_suits(config: ModelConfig) -> bool:
    return suits(config) and config.router == "sigmoid" and config.num_experts >= 2


def _to_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    return {
        **hf_fields(config, model_type, architecture),
        **{name: getattr(config, name) for name in LATENT},
        "q_lora_rank": config.q_lora_rank or None,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "n_shared_experts": config.n_shared_experts,
        "first_k_dense_replace": config.sparse_layers[0],
        "moe_layer_freq": 1,
        "norm_topk_prob": config.norm_topk_prob,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "routed_scaling_factor": config.routed_scaling_factor,
    }


def v2_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **_to_hf(config, "deepseek_v2", "DeepseekV2ForCausalLM"),
        "topk_method": "group_limited_greedy" if config.n_group > 1 else "greedy",
        "scoring_func": "softmax",
    }


def v3_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **_to_hf(config, "deepseek_v3", "DeepseekV3ForCausalLM"),
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": config.rope_interleave,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
    }


def _from_hf(reader: HfReader, **fields: Any) -> ModelConfig:
    raw = reader.raw
    reader.only("moe_layer_freq", 1)
    return reader.build(
        intermediate_size=reader.need("intermediate_size"),
        qk_norm="none",
        **reader.biases(),
        num_key_value_heads=reader.need("num_attention_heads"),
        head_dim=reader.need("qk_rope_head_dim"),
        **{name: reader.need(name) for name in LATENT if name != "q_lora_rank"},
        q_lora_rank=raw.get("q_lora_rank") or 0,
        num_experts=reader.need("n_routed_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("moe_intermediate_size"),
        n_shared_experts=raw.get("n_shared_experts") or 0,
        mlp_only_layers=tuple(reader.layers()[: reader.count("first_k_dense_replace", default=0)]),
        routed_scaling_factor=raw.get("routed_scaling_factor", 1.0),
        **fields,
    )


def v2_from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader({"n_shared_experts": 2, **raw}, source)
    reader.only("topk_method", "greedy", "group_limited_greedy")
    reader.only("scoring_func", "softmax")
    reader.only("norm_topk_prob", False)
    reader.only("mlp_bias", False)
    grouped = raw.get("topk_method") == "group_limited_greedy"
    return _from_hf(
        reader,
        model_type="deepseek_v2",
        rope_interleave=True,
        router="softmax",
        norm_topk_prob=False,
        n_group=reader.need("n_group") if grouped else 1,
        topk_group=reader.need("topk_group") if grouped else 1,
    )


def v3_from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader({**_V3_DEFAULTS, **raw}, source)
    raw = reader.raw
    reader.only("topk_method", "noaux_tc")
    reader.only("scoring_func", "sigmoid")
    return _from_hf(
        reader,
        model_type="deepseek_v3",
        rope_interleave=raw.get("rope_interleave", True),
        router="sigmoid",
        norm_topk_prob=raw.get("norm_topk_prob", True),
        n_group=raw.get("n_group") or 1,
        topk_group=raw.get("topk_group") or 1,
        num_nextn_predict_layers=raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers", 0)),
    )


def v3_tensor_map(config: ModelConfig) -> SlotMap:
    slots = common.tensor_map(config)
    if config.num_nextn_predict_layers:
        slots |= predictor(config, sparse_mlp)
    return slots


def predictor(config: ModelConfig, sparse: Sparse) -> SlotMap:
    """The layer after the last, with copies of the embedding and the head for engines that want them."""
    last = f"layers.{config.num_hidden_layers}."
    kind = sparse if config.is_sparse else common.dense_mlp
    block = layer_map(config, f"model.{last}".rstrip("."), kind)
    slots = {
        name: replace(slot, name=slot.name.replace(last, "mtp.0.layer.")) for name, slot in block.items()
    }
    prefix, head = f"model.{last}", "embed_tokens" if config.tie_word_embeddings else "lm_head"
    for part in ("enorm", "hnorm", "eh_proj"):
        slots[f"{prefix}{part}.weight"] = Slot(f"mtp.0.{part}.weight")
    slots[f"{prefix}shared_head.norm.weight"] = Slot("mtp.0.norm.weight")
    slots[f"{prefix}shared_head.head.weight"] = Slot(f"{head}.weight", is_copy=True)
    slots[f"{prefix}embed_tokens.weight"] = Slot("embed_tokens.weight", is_copy=True)
    return slots


def v3_present(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Published configs promise the predictor even where a file (transformers' own) leaves it out."""
    if f"model.layers.{config.num_hidden_layers}.eh_proj.weight" in names:
        return config
    return config.model_copy(update={"num_nextn_predict_layers": 0})


def v3_is_redundant(config: ModelConfig, name: str, names: Collection[str]) -> bool:
    """With a predictor that the config does not mention."""
    ahead = not config.num_nextn_predict_layers and common.in_predictor(config, name, names)
    return ahead or common.is_redundant(config, name)


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    OPTIONS,
    v2_suits,
    v2_to_hf,
    v2_from_hf,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    OPTIONS | {"num_nextn_predict_layers"},
    v3_suits,
    v3_to_hf,
    v3_from_hf,
    v3_tensor_map,
    v3_is_redundant,
    v3_present,
)
