"""The model that is measured: read from disk, or made of random weights; refused where it does not fit."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tenfold import compiled
from tenfold.bench.settings import BenchSettings
from tenfold.checkpoint import load_config, load_decoder_only
from tenfold.config import ModelConfig
from tenfold.engine.budget import Room
from tenfold.engine.loading import load_packed_within, no_budget, runs_packed
from tenfold.engine.random_weights import random_packed, random_packed_bytes
from tenfold.engine.runner import Runner, new_runner
from tenfold.errors import TenfoldError
from tenfold.hub import resolve
from tenfold.memory import Budget, check_fits
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel, Weight
from tenfold.presets import load_preset
from tenfold.switch_config import AnyConfig, decoder_only

ROOM_BYTES = 1 << 28
"""For what a run takes beside weights and KV cache."""


@dataclass(frozen=True)
class Subject:
    config: ModelConfig
    weights: Mapping[str, Weight]
    runner: Runner
    backend: str
    """What multiplies: "native" or "torch"."""
    load_seconds: float


def load(path_or_id: str, settings: BenchSettings) -> Subject:
    """A packed directory through the native kernels, where they are; any other model through torch."""
    path = resolve(path_or_id)
    config = _checked(load_config(path), path_or_id, settings)
    start = time.perf_counter()
    if runs_packed(path):
        return _native_subject(load_packed_within(path, Budget(), _room(settings)), settings, start)
    _check_fits(
        4 * config.num_params(),
        config,
        f"{path_or_id} in float32",
        settings,
        "pack it, or take a smaller one",
    )
    return _torch_subject(load_decoder_only(path), settings, start)


def load_within(path_or_id: str, settings: BenchSettings, memory: Budget) -> PackedModel:
    """A packed model within a budget. Raises TenfoldError for any other, and as `load_packed_within` does."""
    path = resolve(path_or_id)
    if not runs_packed(path):
        raise TenfoldError(f"--memory: {path} {no_budget(path)}")
    _checked(load_config(path), path_or_id, settings)
    return load_packed_within(path, memory, _room(settings))


def _room(settings: BenchSettings) -> Room:
    return Room(settings.batch, settings.prompt_tokens + settings.tokens)


def random(settings: BenchSettings) -> Subject:
    """The shape of a preset with random weights: packed, or in float32 where there are no native kernels."""
    assert settings.shape is not None
    config = cut(_checked(load_preset(settings.shape), settings.shape, settings), settings.layers)
    what = f"{settings.shape} with {config.num_hidden_layers} layers"
    start = time.perf_counter()
    if compiled.available():
        packing = settings.packing
        what = f"{what} in {packing.experts} and {packing.rest}"
        _check_fits(random_packed_bytes(config, packing), config, what, settings, "cut it with --layers")
        return _native_subject(random_packed(config, packing), settings, start)
    if settings.experts or settings.rest:
        raise TenfoldError(
            "--experts and --rest need the native kernels, which this installation lacks: install tenfold"
            " where there is a C++20 compiler, or leave them out to measure torch in float32"
        )
    _check_fits(4 * config.num_params(), config, f"{what} in float32", settings, "cut it with --layers")
    return _torch_subject(Transformer(config).init_weights(0).eval(), settings, start)


def cut(config: ModelConfig, layers: int | None) -> ModelConfig:
    """The first `layers` layers of a model. Raises TenfoldError if it has fewer."""
    if layers is None:
        return config
    if layers > config.num_hidden_layers:
        raise TenfoldError(f"--layers {layers} is more than the {config.num_hidden_layers} there are")
    kept = {
        "num_hidden_layers": layers,
        "layer_types": config.layer_types[:layers],
        "mlp_only_layers": tuple(layer for layer in config.mlp_only_layers if layer < layers),
    }
    return config.model_copy(update=kept)


def largest_file(model: str | None) -> Path | None:
    """Of a model on disk, the file that most of it is in."""
    if model is None:
        return None
    path = resolve(model)
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def _native_subject(model: PackedModel, settings: BenchSettings, start: float) -> Subject:
    runner = new_runner(model, settings.batch, settings.prompt_tokens + settings.tokens)
    return Subject(model.config, model.weights, runner, "native", time.perf_counter() - start)


def _torch_subject(model: Transformer, settings: BenchSettings, start: float) -> Subject:
    runner = new_runner(model, settings.batch, settings.prompt_tokens + settings.tokens)
    weights = dict(model.named_parameters())
    return Subject(model.config, weights, runner, "torch", time.perf_counter() - start)


def _checked(config: AnyConfig, name: str, settings: BenchSettings) -> ModelConfig:
    config = decoder_only(config, name)
    positions = settings.prompt_tokens + settings.tokens
    if positions > config.max_position_embeddings:
        raise TenfoldError(
            f"--prompt-tokens and --tokens are {positions} together; the context of {name}"
            f" (max_position_embeddings) holds {config.max_position_embeddings}"
        )
    return config


def _check_fits(size: int, config: ModelConfig, what: str, settings: BenchSettings, instead: str) -> None:
    positions = settings.batch * (settings.prompt_tokens + settings.tokens)
    check_fits(size + positions * config.kv_bytes_per_token("float32") + ROOM_BYTES, what, instead)


def formats(weights: Mapping[str, Weight]) -> dict[str, str]:
    """Of the routed experts, where there are any, and of the other matrices."""
    found = {}
    for name, weight in weights.items():
        form = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else weight.format
        if ".mlp.experts" in name and not name.endswith("bias"):
            found["experts"] = form
        elif name.endswith(".o_proj.weight"):  # a tied embedding may be wider than the rest
            found["rest"] = form
    return found
