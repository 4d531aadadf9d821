"""tenfold's own type, for what no published family can represent: ModelConfig as it is."""

from typing import Any

from tenfold.checkpoint.families.common import Family
from tenfold.config import ModelConfig

MODEL_TYPE, ARCHITECTURE = "tenfold", "TenfoldForCausalLM"

_NOT_OURS = {"architectures", "dtype", "transformers_version"}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    kind = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    return {**config.model_dump(mode="json"), **kind}


def from_hf(raw: dict[str, Any], source: str) -> ModelConfig:
    return ModelConfig.parse({k: v for k, v in raw.items() if k not in _NOT_OURS}, source)


NATIVE = Family(MODEL_TYPE, ARCHITECTURE, lambda _: True, to_hf, from_hf)
