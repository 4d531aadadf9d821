"""Hugging Face model families: which one a config is saved as, and how its files are read.

A new family is one small file here and one entry in FAMILIES. Nothing here needs torch.
"""

from typing import Any

from tenfold.checkpoint.families.common import Family
from tenfold.checkpoint.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from tenfold.checkpoint.families.glm4_moe import GLM4_MOE
from tenfold.checkpoint.families.gpt_oss import GPT_OSS
from tenfold.checkpoint.families.granitemoe import GRANITEMOE
from tenfold.checkpoint.families.llama import LLAMA, MISTRAL
from tenfold.checkpoint.families.mixtral import MIXTRAL
from tenfold.checkpoint.families.native import NATIVE
from tenfold.checkpoint.families.olmoe import OLMOE
from tenfold.checkpoint.families.qwen2_moe import QWEN2_MOE
from tenfold.checkpoint.families.qwen3 import QWEN3
from tenfold.checkpoint.families.qwen3_moe import QWEN3_MOE
from tenfold.checkpoint.families.switch import SWITCH
from tenfold.config import ModelConfig
from tenfold.config_checks import problems
from tenfold.errors import TenfoldError, nearest
from tenfold.switch_config import AnyConfig, SwitchConfig

__all__ = ["FAMILIES", "NATIVE", "Family", "family_for", "family_of", "why_native"]

FAMILIES = (
    QWEN3,
    LLAMA,
    MISTRAL,
    QWEN3_MOE,
    OLMOE,
    MIXTRAL,
    QWEN2_MOE,
    GRANITEMOE,
    GPT_OSS,
    GLM4_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    SWITCH,
    NATIVE,
)
"""In order of preference for a config that names none; the last takes everything."""

_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}


def family_for(config: AnyConfig) -> Family:
    """The family `config.model_type` names if it can hold the config, else the first that can."""
    if isinstance(config, SwitchConfig):
        return SWITCH
    if config.model_type is not None:
        if config.model_type not in _BY_MODEL_TYPE:
            raise TenfoldError(_unknown("model_type", config.model_type))
        if _BY_MODEL_TYPE[config.model_type].fits(config):
            return _BY_MODEL_TYPE[config.model_type]
    return next(family for family in FAMILIES if family.fits(config))


def family_of(raw: dict[str, Any], source: str) -> Family:
    """The family of a config.json, by `architectures`, or by `model_type` where that is absent."""
    architectures = raw.get("architectures")
    for family in FAMILIES:
        if [family.architecture] == architectures:
            return family
        if not architectures and family.model_type == raw.get("model_type"):
            return family
    field = "architectures" if architectures else "model_type"
    raise TenfoldError(f"{source}: {_unknown(field, raw.get(field))}")


def why_native(config: ModelConfig) -> str:
    """The field that keeps every published family from holding this config, with its value."""
    for name, info in ModelConfig.model_fields.items():
        if name == "num_experts":
            continue  # every dense model of the usual shape has a family: that would be no reason
        usual = config.model_copy(update={name: info.default})
        if next(problems(usual), None) is not None:
            continue  # it only holds together with another field
        if any(family.fits(usual) for family in FAMILIES if family is not NATIVE):
            return f"{name} {getattr(config, name)}"
    return "this combination of options"


def _unknown(field: str, given: object) -> str:
    known = [getattr(f, "architecture" if field == "architectures" else field) for f in FAMILIES]
    name = str(given)[:100]
    return f"unknown {field} {name}{nearest(name, known)}; known: {', '.join(known)}"
