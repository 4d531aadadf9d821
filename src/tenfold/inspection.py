"""What is in a model and what it will need, counted from its config alone."""

from pathlib import Path
from typing import Any

from tenfold.checkpoint import load_config
from tenfold.checkpoint.families import family_for
from tenfold.counting import BYTES_PER_WEIGHT
from tenfold.errors import TenfoldError
from tenfold.presets import load_preset
from tenfold.switch_config import AnyConfig


def find_config(name: str) -> AnyConfig:
    """The config of a model directory, or of the preset called `name`."""
    if Path(name).is_dir():
        return load_config(Path(name))
    if "/" in name:
        raise TenfoldError(f"{name}: no such model directory")
    return load_preset(name)


def describe(config: AnyConfig, context: int) -> dict[str, Any]:
    """Parameters by kind, FLOPs of a token at `context`, bytes by dtype. Names are stable."""
    counts, total = config.params(), config.num_params()
    active = config.num_active_params()
    return {
        "architecture": family_for(config).architecture,
        "total_params": total,
        "active_params": active,
        "active_params_without_input_embedding": config.num_active_params(input_embedding=False),
        "active_fraction": active / total,
        "embedding_params": counts.embedding,
        "lm_head_params": counts.lm_head,
        "attention_params": counts.attention,
        "norm_params": counts.norms,
        "dense_mlp_params": counts.dense_mlp,
        "shared_expert_params": counts.shared_experts,
        "router_params": counts.router,
        "expert_params": counts.experts,
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "context": context,
        "flops_per_token": config.flops_per_token(context),
        "weight_bytes": {dtype: total * size for dtype, size in BYTES_PER_WEIGHT.items()},
        "weight_bytes_per_token": {d: config.weight_bytes_per_token(d) for d in BYTES_PER_WEIGHT},
        "kv_bytes_per_token": {d: config.kv_bytes_per_token(d) for d in BYTES_PER_WEIGHT},
    }
