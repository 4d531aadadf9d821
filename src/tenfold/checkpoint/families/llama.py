"""Llama (arXiv:2407.21783) and Mistral (arXiv:2310.06825), dense: no QK-norm; Mistral may slide."""

from typing import Any

from tenfold.checkpoint.families.common import (
    BIASES,
    WINDOW,
    WINDOW_LEFT_OUT,
    Family,
    HfReader,
    biases_all_or_none,
    hf_fields,
    shares_out_evenly,
    slides_everywhere_or_nowhere,
)
from tenfold.config import ModelConfig


def is_plain(config: ModelConfig) -> bool:
    return not config.is_sparse and config.qk_norm == "none"


def is_llama(config: ModelConfig) -> bool:
    return is_plain(config) and biases_all_or_none(config) and shares_out_evenly(config)


def llama_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "llama", "LlamaForCausalLM"),
        "head_dim": config.head_dim,
        "mlp_bias": config.mlp_bias,
    }


def llama_from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    reader.only("pretraining_tp", 1)
    return reader.build(
        model_type="llama",
        intermediate_size=reader.need("intermediate_size"),
        qk_norm="none",
        **reader.biases(),
        mlp_bias=raw.get("mlp_bias", False),
    )


def is_mistral(config: ModelConfig) -> bool:
    return is_plain(config) and slides_everywhere_or_nowhere(config)


def mistral_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "mistral", "MistralForCausalLM"),
        "head_dim": config.head_dim,
        "sliding_window": config.window(0),
    }


def mistral_from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    return reader.build(
        model_type="mistral",
        intermediate_size=reader.need("intermediate_size"),
        qk_norm="none",
        sliding_window=raw.get("sliding_window", WINDOW_LEFT_OUT),
        layer_types=raw.get("layer_types") or (),  # with which transformers takes it for a Ministral
    )


LLAMA = Family("llama", "LlamaForCausalLM", BIASES | {"mlp_bias"}, is_llama, llama_to_hf, llama_from_hf)
MISTRAL = Family("mistral", "MistralForCausalLM", WINDOW, is_mistral, mistral_to_hf, mistral_from_hf)
