"""Qwen3, dense (arXiv:2505.09388)."""

from typing import Any

from tenfold.checkpoint.families.common import Family, HfReader, hf_fields
from tenfold.config import ModelConfig


def has_qwen3_attention(config: ModelConfig) -> bool:
    """Per-head QK-norm and whole-head rotation; Qwen3's `attention_bias` would bias o_proj too."""
    return config.qk_norm == "head" and not config.attention_bias and config.partial_rotary_factor == 1


def refuse_other_attention(reader: HfReader) -> None:
    """Options that Qwen3's attention has and tenfold's has not."""
    reader.only("attention_bias", False)
    reader.only("use_sliding_window", False)
    reader.only("partial_rotary_factor", 1)
    full = ["full_attention"] * reader.count("num_hidden_layers")
    if reader.raw.get("layer_types") not in (None, full):
        reader.fail("layer_types", "'full_attention' in every layer")


def fits(config: ModelConfig) -> bool:
    return not config.is_sparse and has_qwen3_attention(config)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {**hf_fields(config, "qwen3", "Qwen3ForCausalLM"), "head_dim": config.head_dim}


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader(raw, source)
    refuse_other_attention(reader)
    return reader.build(
        model_type="qwen3",
        intermediate_size=reader.need("intermediate_size"),
        head_dim=reader.need("head_dim"),
        qk_norm="head",
    )


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", fits, to_hf, from_hf)
