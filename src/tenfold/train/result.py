"""What a finished run cost and reached; names as in report.json."""

from typing import Any

from tenfold.checkpoint.families import NATIVE, family_for, why_native
from tenfold.config import ModelConfig
from tenfold.train.settings import TrainSettings
from tenfold.train.state import Progress


def summarize(config: ModelConfig, settings: TrainSettings, progress: Progress) -> dict[str, Any]:
    tokens = progress.step * settings.step_tokens
    result = {
        "total_params": config.num_params(),
        "active_params": config.num_active_params(),
        "tokens": tokens,
        "train_flops": tokens * config.train_flops_per_token(settings.seq_len),
        "train_seconds": progress.seconds,
        "train_tokens_per_second": tokens / progress.seconds,
        "val_bits_per_byte": progress.curve[-1]["bits_per_byte"],
        "curve": progress.curve,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "precision": settings.precision,
        "saved_as": saved_as(config),
    }
    if config.is_sparse and config.router == "expert_choice":
        result["caution"] = "expert_choice has seen the future of the text it was scored on"
    return result


def saved_as(config: ModelConfig) -> str:
    """The Hugging Face architecture a model is saved as; if it is tenfold's own, why."""
    family = family_for(config)
    if family is NATIVE:
        return f"{family.architecture} (no published family has {why_native(config)})"
    return family.architecture
