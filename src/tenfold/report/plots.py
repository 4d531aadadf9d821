"""The report's pictures, as SVG text that goes into the page."""

import io
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#8a8f98"
"""Readable on a light and on a dark page."""
COLORS = {"sparse": "#e4572e", "dense_active": "#4a90d9", "dense_total": "#7a9e48"}
NAMES = {
    "sparse": "sparse",
    "dense_active": "dense, equal active",
    "dense_total": "dense, equal total",
}
STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "text.parse_math": False,  # names of files and models are no formulas
    "svg.fonttype": "none",
    "svg.hashsalt": "tenfold",
}


def learning_curves(models: dict[str, Any]) -> str:
    """Bits per byte against tokens, FLOPs and seconds, side by side."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10, 3.1), sharey=True, layout="constrained")
        units = (
            ("tokens", 1e6, "training tokens (millions)"),
            ("flops", 1e12, "training TFLOPs"),
            ("seconds", 1, "training seconds"),
        )
        for axis, (field, unit, label) in zip(axes, units, strict=True):
            for name, model in models.items():
                x = [point[field] / unit for point in model["curve"]]
                y = [point["bits_per_byte"] for point in model["curve"]]
                axis.plot(x, y, "o-", ms=3, lw=1.6, color=COLORS[name], label=NAMES[name])
            axis.set_xlabel(label)
            axis.grid(alpha=0.2)
        axes[0].set_ylabel("validation bits per byte")
        axes[2].legend(frameon=False)
        return svg(figure)


def token_costs(models: dict[str, Any]) -> str:
    """Weight bytes a generated token reads, and measured tokens per second."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(10, 1.9), layout="constrained")
        bars(
            axes[0],
            models,
            "weight_bytes_per_token",
            1e6,
            "MB of weights per token (fewer is better)",
        )
        bars(axes[1], models, "decode_tokens_per_second", 1, "tokens per second (more is better)")
        axes[1].set_yticklabels([])
        return svg(figure)


def bars(axis: Axes, models: dict[str, Any], field: str, unit: float, label: str) -> None:
    values = [model[field] / unit for model in models.values()]
    drawn = axis.barh([NAMES[name] for name in models], values, color=[COLORS[n] for n in models])
    axis.bar_label(drawn, fmt="{:,.1f}" if max(values) < 100 else "{:,.0f}", padding=3, color=INK)
    axis.set_xlabel(label)
    axis.margins(x=0.15)
    axis.invert_yaxis()


def expert_load(experts: dict[str, Any]) -> str:
    """Layers by experts; 1 is a fair share."""
    load = np.array(experts["load"])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(10, 0.6 + 0.32 * len(load)), layout="constrained")
        image = axis.imshow(load, aspect="auto", cmap="magma", vmin=0, vmax=max(2.0, load.max()))
        axis.set_yticks(range(len(load)), [f"layer {layer}" for layer in experts["layers"]])
        axis.set_xlabel("expert")
        figure.colorbar(image, label="load (fair = 1)")
        return svg(figure)


def preferences(experts: dict[str, Any]) -> str:
    """For each sparse layer, kinds of text by experts: how many times the usual share."""
    lift = np.array(experts["preference"])
    rows = len(lift)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            1,
            figsize=(10, 1.35 * rows + 0.4),
            sharex=True,
            layout="constrained",
            squeeze=False,
        )
        for axis, layer, values in zip(axes[:, 0], experts["layers"], lift, strict=True):
            scale = np.log2(np.clip(values, 1 / 8, 8))
            image = axis.imshow(scale, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
            axis.set_yticks(range(len(experts["kinds"])), experts["kinds"])
            axis.set_title(f"layer {layer}", loc="left", fontsize=9)
        axes[-1, 0].set_xlabel("expert")
        bar = figure.colorbar(image, ax=axes, ticks=[-3, 0, 3], label="use by this kind of text")
        bar.ax.set_yticklabels(["1/8x", "as usual", "8x"])
        return svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, without the XML prologue, on a transparent ground."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
