"""A model's own figures: how fast it is, what it reads, and how near that comes to the ceilings."""

from contextlib import nullcontext
from typing import Any

from tenfold.bench import subject
from tenfold.bench.ceilings import KINDS
from tenfold.bench.settings import BenchSettings
from tenfold.bench.speed import measure
from tenfold.config import ModelConfig
from tenfold.device import one_torch_thread
from tenfold.engine.reading import Reading
from tenfold.memory import peak_memory_bytes


def measure_model(model: str | None, settings: BenchSettings) -> dict[str, Any]:
    """Of a model on disk, or of the shape that the settings name. Nothing of the model stays in memory."""
    found = subject.random(settings) if model is None else subject.load(model, settings)
    with one_torch_thread() if found.backend == "native" else nullcontext():  # as `generate` runs it
        speed = measure(found.runner, found.config.vocab_size, settings)
    reading = Reading.of(found.config, found.weights, settings.batch)
    return {
        "model": model or settings.shape,
        "num_hidden_layers": found.config.num_hidden_layers,
        "batch": settings.batch,
        "backend": found.backend,
        "formats": subject.formats(found.weights),
        "load_seconds": found.load_seconds,
        "prefill_tokens_per_second": settings.batch * settings.prompt_tokens / speed.prefill,
        "decode_tokens_per_second": settings.batch / speed.decode_step,
        "prefill_ops_per_second": prefill_ops(found.config, settings) / speed.prefill,
        "weight_bytes_per_token": reading.bytes_per_step / settings.batch,
        "experts_per_layer_and_step": reading.experts_per_layer,
        "python_overhead_fraction": speed.python_overhead,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def prefill_ops(config: ModelConfig, settings: BenchSettings) -> int:
    """Operations of the matrices that a prompt is multiplied by, the head once a sequence.

    Two a weight. Attention's products of tokens with tokens are left out: they grow with the prompt
    and run in another precision.
    """
    head = 2 * config.vocab_size * config.hidden_size
    return settings.batch * (settings.prompt_tokens * (config.flops_per_token(0) - head) + head)


def with_fractions(measured: dict[str, Any]) -> dict[str, Any]:
    """The same, and how much of the ceilings was reached."""
    if "model" not in measured:
        return measured
    read = measured["decode_tokens_per_second"] * measured["weight_bytes_per_token"]
    fractions = {"decode_fraction_of_bandwidth": read / measured["read_bandwidth_bytes_per_second"]}
    for ceiling, kind in KINDS.items():
        peak, reached = measured[ceiling], measured["prefill_ops_per_second"]
        fractions[f"prefill_fraction_of_{kind}_peak"] = reached / peak if peak else None
    return measured | fractions
