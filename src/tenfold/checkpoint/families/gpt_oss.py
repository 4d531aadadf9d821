"""gpt-oss (OpenAI's gpt-oss-20b and 120b model card, arXiv:2508.10925): sinks, windows, biases."""

from typing import TYPE_CHECKING, Any

from tenfold.checkpoint.families.common import (
    BIASES,
    EXPERTS,
    WINDOW,
    Family,
    HfReader,
    all_sparse,
    biases_all_or_none,
    decoder_map,
    hf_fields,
    ours,
    renormalizes,
    routes_by_softmax,
    written_window,
)
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


_DEFAULTS = {
    "head_dim": 64,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
"""What transformers takes for a field that is left out, where a wrong guess would go unnoticed."""


def suits(config: ModelConfig) -> bool:
    return (
        routes_by_softmax(config)
        and renormalizes(config)
        and all_sparse(config)
        and config.qk_norm == "none"
        and config.attention_sinks
        and config.moe_bias
        and biases_all_or_none(config)
        and config.hidden_act == "clamped_swiglu"
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        **hf_fields(config, "gpt_oss", "GptOssForCausalLM"),
        "intermediate_size": config.moe_intermediate_size,
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "experts_per_token": config.num_experts_per_tok,
        **written_window(config),
        "swiglu_limit": 7.0,
    }


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    reader = HfReader({**_DEFAULTS, **raw}, source)
    raw = reader.raw
    reader.only("swiglu_limit", 7.0)
    reader.only("swiglu_alpha", 1.702)
    return reader.build(
        model_type="gpt_oss",
        intermediate_size=0,
        qk_norm="none",
        **reader.biases(default=True),
        attention_sinks=True,
        sliding_window=raw.get("sliding_window"),
        layer_types=tuple(reader.layer_types(lambda layer: layer % 2 == 0)),
        hidden_act="clamped_swiglu",
        moe_bias=True,
        router="topk_softmax",
        num_experts=reader.need("num_local_experts"),
        num_experts_per_tok=reader.need("num_experts_per_tok"),
        moe_intermediate_size=reader.need("intermediate_size"),
    )


def tensor_map(config: ModelConfig) -> SlotMap:
    return decoder_map(config, _sparse)


def _sparse(_: ModelConfig, prefix: str) -> SlotMap:
    """Stacked and transposed, gate and up alternating: (E, D, 2F) and (E, F, D)."""
    mlp, experts = ours(prefix), f"{prefix}.experts"
    return {
        f"{prefix}.router.weight": Slot(f"{mlp}.router.weight"),
        f"{prefix}.router.bias": Slot(f"{mlp}.router.logit_bias"),
        f"{experts}.gate_up_proj": Slot(f"{mlp}.experts.gate_up", _alternating, merged=2),
        f"{experts}.gate_up_proj_bias": Slot(f"{mlp}.experts.gate_up_bias", _alternating_bias, merged=1),
        f"{experts}.down_proj": Slot(f"{mlp}.experts.down", _transposed),
        f"{experts}.down_proj_bias": Slot(f"{mlp}.experts.down_bias"),
    }


def _alternating(gate_up: "Tensor") -> "Tensor":
    """(E, 2F, D) -> (E, D, F, 2)."""
    view: Tensor = gate_up.unflatten(1, (2, -1)).permute(0, 3, 2, 1)
    return view


def _alternating_bias(bias: "Tensor") -> "Tensor":
    """(E, 2F) -> (E, F, 2)."""
    view: Tensor = bias.unflatten(1, (2, -1)).transpose(1, 2)
    return view


def _transposed(down: "Tensor") -> "Tensor":
    return down.transpose(1, 2)


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    EXPERTS | BIASES | WINDOW | {"attention_sinks", "moe_bias", "hidden_act"},
    suits,
    to_hf,
    from_hf,
    tensor_map,
)
