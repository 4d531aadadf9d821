"""What a trace says, as one picture."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from tenfold.report.plots import STYLE, svg
from tenfold.trace.table import POLICIES

COLORS = {"lru": "#4a90d9", "fitted": "#7a9e48", "lfu": "#e4572e", "belady": "#8a8f98"}


def draw(found: dict[str, Any]) -> str:
    """SVG: hit rates, reuse and look-ahead in a row, below them a map of the load for each kind of text."""
    loads = {kind: np.array(load) for kind, load in found["load"].items()}
    height = 0.7 + 0.11 * len(found["layers"])
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 3.2 + height * len(loads)), layout="constrained")
        grid = figure.add_gridspec(1 + len(loads), 3, height_ratios=[3.2, *[height] * len(loads)])
        for column, part in enumerate((_hit_rates, _reuse, _layers)):
            part(figure.add_subplot(grid[0, column]), found)
        maps = [figure.add_subplot(grid[1 + n, :]) for n in range(len(loads))]
        most = max(2.0, *(float(load.max()) for load in loads.values()))
        for axis, (kind, load) in zip(maps, loads.items(), strict=True):
            image = axis.imshow(load, aspect="auto", cmap="magma", vmin=0, vmax=most)
            axis.set_title(kind, loc="left", fontsize=9)
            shown = range(0, len(load), -(-len(load) // 8))
            axis.set_yticks(shown, [f"layer {found['layers'][n]}" for n in shown])
        maps[-1].set_xlabel("expert")
        figure.colorbar(image, ax=maps, label="load (fair = 1)")
        return svg(figure)


def _hit_rates(axis: Axes, found: dict[str, Any]) -> None:
    rows = found["hit_rate"]
    memory = [100 * row["memory"] for row in rows]
    for policy, label in POLICIES.items():
        rates = [100 * row[policy] for row in rows]
        axis.plot(memory, rates, "o-", ms=3, lw=1.6, color=COLORS[policy], label=label)
    axis.set(xlabel="% of the experts in memory", ylabel="% of uses that find their expert")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False)


def _reuse(axis: Axes, found: dict[str, Any]) -> None:
    within = found["reuse_within"]
    axis.plot(range(len(within)), [100 * share for share in within], lw=1.6, color=COLORS["lfu"])
    axis.set(xlabel="other experts of the layer used since, at most", ylabel="% of uses")
    axis.grid(alpha=0.2)


def _layers(axis: Axes, found: dict[str, Any]) -> None:
    lines = {
        "foreseen a layer earlier": ("lookahead_layers", "lookahead", COLORS["lfu"]),
        "repeated by the next token": ("layers", "repeated", COLORS["lru"]),
    }
    for label, (layers, shares, color) in lines.items():
        axis.plot(
            found[layers], [100 * x for x in found[shares]], "o-", ms=3, lw=1.6, color=color, label=label
        )
    axis.set(xlabel="layer", ylabel="% of a token's experts")
    axis.set_ylim(0, 100)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.2)
    axis.legend(frameon=False)
