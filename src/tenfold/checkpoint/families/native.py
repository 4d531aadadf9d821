"""tenfold's own type, for what no published family can represent: ModelConfig as it is."""

from typing import Any

from tenfold.checkpoint.families.common import Family, decoder_map, ours, sparse_mlp, whole
from tenfold.checkpoint.families.deepseek import predictor
from tenfold.checkpoint.quantization_config import weight_block_size
from tenfold.checkpoint.slot import Slot, SlotMap
from tenfold.config import ModelConfig

MODEL_TYPE, ARCHITECTURE = "tenfold", "TenfoldForCausalLM"

_NOT_OURS = {"architectures", "dtype", "quantization_config", "transformers_version"}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    kind = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    return {**config.model_dump(mode="json"), **kind}


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    weight_block_size(raw, source)  # refuses other ways to quantise
    return ModelConfig.parse({k: v for k, v in raw.items() if k not in _NOT_OURS}, source)


def tensor_map(config: ModelConfig) -> SlotMap:
    """Names as DeepSeek publishes them, with what its layers have not."""
    slots = decoder_map(config, _sparse)
    return slots | predictor(config, _sparse) if config.num_nextn_predict_layers else slots


def _sparse(config: ModelConfig, prefix: str) -> SlotMap:
    slots, mlp = sparse_mlp(config, prefix), ours(prefix)
    if config.moe_bias:
        slots[f"{prefix}.gate.bias"] = Slot(f"{mlp}.router.logit_bias")
        slots |= whole(f"{prefix}.experts.gate_up_bias", f"{prefix}.experts.down_bias")
    if config.shared_expert_gate:
        slots |= whole(f"{prefix}.shared_expert_gate.weight")
    return slots


NATIVE = Family(
    MODEL_TYPE,
    ARCHITECTURE,
    frozenset(ModelConfig.model_fields),
    lambda _: True,
    to_hf,
    from_hf,
    tensor_map,
)
