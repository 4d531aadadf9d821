"""Qwen3, dense (arXiv:2505.09388)."""

from typing import Any

from tenfold.checkpoint.families.common import (
    BIASES,
    WINDOW,
    Family,
    HfReader,
    biases_all_or_none,
    hf_fields,
    written_window,
)
from tenfold.config import ModelConfig


def suits(config: ModelConfig) -> bool:
    return not config.is_sparse and config.qk_norm == "head" and biases_all_or_none(config)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "qwen3", "Qwen3ForCausalLM"),
        "head_dim": config.head_dim,
        **written_window(config),
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    reader.only("partial_rotary_factor", 1)
    return reader.build(
        model_type="qwen3",
        intermediate_size=reader.need("intermediate_size"),
        head_dim=reader.need("head_dim"),
        qk_norm="head",
        **reader.biases(),
        **reader.optional_window(lambda layer, first: layer >= first),
    )


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", BIASES | WINDOW, suits, to_hf, from_hf)
