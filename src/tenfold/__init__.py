"""tenfold: sparse (Mixture-of-Experts) language models, with an honest meter."""

from typing import Any

__all__ = [
    "LLM",
    "ModelConfig",
    "SamplingParams",
    "TenfoldError",
    "load_model",
    "load_tokenizer",
    "save_model",
]

_HOMES = {
    "LLM": "tenfold.engine.llm",
    "ModelConfig": "tenfold.config",
    "SamplingParams": "tenfold.sampling",
    "TenfoldError": "tenfold.errors",
    "load_model": "tenfold.checkpoint",
    "load_tokenizer": "tenfold.tokenizer",
    "save_model": "tenfold.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Imported when first asked for, so that `import tenfold` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tenfold' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
