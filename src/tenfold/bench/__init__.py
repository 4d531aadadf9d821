"""What this machine can do at most, and how near a model comes to it: the verb `bench`."""

from typing import TYPE_CHECKING, Any

from tenfold.bench.settings import BenchSettings
from tenfold.files import check_writable, write_text

if TYPE_CHECKING:
    from rich.console import Console


def bench(model: str | None, settings: BenchSettings) -> dict[str, Any]:
    """The figures that `tenfold bench --json` prints; their names are stable.

    With memory budgets, the model within each of them; without a model and a shape, the machine's ceilings
    alone. The model is measured first and let go, because the ceilings take memory of their own. Raises
    TenfoldError for settings that contradict each other, and for a model that does not fit its context or
    the memory.
    """
    from rich.console import Console

    settings.check(model)
    if settings.plot is not None:
        check_writable(settings.plot)
    progress = Console(stderr=True)
    if model is not None and settings.budgets:
        return _curve(model, settings, progress)

    from tenfold.bench import ceilings, subject
    from tenfold.bench.model import measure_model, with_fractions
    from tenfold.bench.threads import use_threads

    measured: dict[str, Any] = {"threads": use_threads(settings.threads)}
    if model is not None or settings.shape is not None:
        with progress.status(f"measuring {model or settings.shape}"):
            measured |= measure_model(model, settings)
    with progress.status("measuring this machine's ceilings"):
        measured |= ceilings.measure(measured["threads"], subject.largest_file(model))
    return with_fractions(measured)


def _curve(model: str, settings: BenchSettings, progress: "Console") -> dict[str, Any]:
    """Over budgets, a process each: this one stays small, for it counts, and measures no ceilings."""
    from tenfold.bench.within import measure_within
    from tenfold.memory import size

    points = []
    for budget in settings.budgets:
        with progress.status(f"measuring {model} within {size(budget)}"):
            points.append(measure_within(model, settings, budget))
    if settings.plot is not None:
        from tenfold.bench.plot import draw

        write_text(settings.plot, draw(points, model))
    return {"model": model, "curve": points}
