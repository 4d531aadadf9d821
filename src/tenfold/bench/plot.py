"""The curve of `bench --memory` as a picture."""

from typing import Any

import matplotlib.pyplot as plt

from tenfold.report.plots import STYLE, svg


def draw(points: list[dict[str, Any]], model: str) -> str:
    """SVG: decoding against the budget, beside what the disk alone would allow."""
    bounded = [point for point in points if point["bound_tokens_per_second"]]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
        measured = [point["decode"]["tokens_per_second"] for point in points]
        bounds = [point["bound_tokens_per_second"] for point in bounded]
        axis.plot(_budgets(points), measured, "o-", label="measured")
        if bounded:
            axis.plot(_budgets(bounded), bounds, "s--", label="if reading what was missing were all")
        axis.set(title=model, xlabel="memory (GiB)", ylabel="decoded tokens/s", ylim=(0, 1.5 * max(measured)))
        axis.grid(alpha=0.2)
        axis.legend(frameon=False)
        return svg(figure)


def _budgets(points: list[dict[str, Any]]) -> list[float]:
    return [point["memory"]["budget_bytes"] / 2**30 for point in points]
