"""The curve of `bench --memory` as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from tenfold.files import writing


def draw(points: list[dict[str, Any]], model: str, file: Path) -> None:
    """Decoding against the budget, beside what the disk alone would allow."""
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    budgets = [point["memory"]["budget_bytes"] / 2**30 for point in points]
    axis.plot(budgets, [point["decode"]["tokens_per_second"] for point in points], "o-", label="measured")
    bounded = [point for point in points if point["bound_tokens_per_second"]]
    axis.plot(
        [point["memory"]["budget_bytes"] / 2**30 for point in bounded],
        [point["bound_tokens_per_second"] for point in bounded],
        "s--",
        label="if reading what was missing were all",
    )
    axis.set(title=model, xlabel="memory budget (GiB)", ylabel="decoded tokens/s", yscale="log")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False)
    with writing(file):
        figure.savefig(file)
    plt.close(figure)
