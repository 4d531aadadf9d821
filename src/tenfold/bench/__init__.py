"""What this machine can do at most, and how near a model comes to it: the verb `bench`."""

from typing import Any

from tenfold.bench.settings import BenchSettings


def bench(model: str | None, settings: BenchSettings) -> dict[str, Any]:
    """The figures that `tenfold bench --json` prints; their names are stable.

    Without a model and a shape, the machine's ceilings alone. The model is measured first and let go,
    because the ceilings take memory of their own. Raises TenfoldError for settings that contradict each
    other, and for a model that does not fit its context or the memory.
    """
    from rich.console import Console

    from tenfold.bench import ceilings, subject
    from tenfold.bench.model import measure_model, with_fractions
    from tenfold.bench.threads import use_threads

    settings.check(model)
    progress = Console(stderr=True)
    measured: dict[str, Any] = {"threads": use_threads(settings.threads)}
    if model is not None or settings.shape is not None:
        with progress.status(f"measuring {model or settings.shape}"):
            measured |= measure_model(model, settings)
    with progress.status("measuring this machine's ceilings"):
        measured |= ceilings.measure(measured["threads"], subject.largest_file(model))
    return with_fractions(measured)
