"""Mixtral (arXiv:2401.04088): Mistral with experts in every layer, softmax over the top-k."""

from typing import Any

from tenfold.checkpoint.families.common import (
    EXPERTS,
    WINDOW,
    Family,
    HfReader,
    all_sparse,
    decoder_map,
    experts,
    hf_fields,
    ours,
    renormalizes,
    routes_by_softmax,
    slides_everywhere_or_nowhere,
)
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.config import ModelConfig


def suits(config: ModelConfig) -> bool:
    return (
        routes_by_softmax(config)
        and renormalizes(config)
        and all_sparse(config)
        and config.qk_norm == "none"
        and slides_everywhere_or_nowhere(config)
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "mixtral", "MixtralForCausalLM"),
        "intermediate_size": config.moe_intermediate_size,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": config.window(0),
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    raw = {"rope_theta": 1e6, **raw}  # transformers' default, unlike other families'
    reader = HfReader(raw, source)
    return reader.build(
        model_type="mixtral",
        intermediate_size=0,
        qk_norm="none",
        sliding_window=raw.get("sliding_window"),
        router="topk_softmax",
        num_experts=reader.need("num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("intermediate_size"),
    )


def tensor_map(config: ModelConfig) -> SlotMap:
    return decoder_map(config, _sparse, mlp="block_sparse_moe")


def _sparse(config: ModelConfig, prefix: str) -> SlotMap:
    """w1 is the gate, w3 is up, w2 is down."""
    gate = {f"{prefix}.gate.weight": Slot(f"{ours(prefix)}.router.weight")}
    return gate | experts(config, prefix, "w1", "w3", "w2")


MIXTRAL = Family("mixtral", "MixtralForCausalLM", EXPERTS | WINDOW, suits, to_hf, from_hf, tensor_map)
