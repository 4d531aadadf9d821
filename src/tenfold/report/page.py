"""The comparison as one self-contained HTML page."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment

from tenfold.report import plots

ROWS = (
    ("total parameters", "total_params", "{:,}"),
    ("active parameters per token", "active_params", "{:,}"),
    ("training tokens", "tokens", "{:,}"),
    ("training FLOPs", "train_flops", "{:.3g}"),
    ("training seconds", "train_seconds", "{:,.0f}"),
    ("training tokens per second", "train_tokens_per_second", "{:,.0f}"),
    ("validation bits per byte", "val_bits_per_byte", "{:.4f}"),
    ("weight bytes per generated token", "weight_bytes_per_token", "{:,}"),
    ("generated tokens per second, batch 1", "decode_tokens_per_second", "{:,.0f}"),
)


def render(report: dict[str, Any]) -> str:
    """HTML of a report.json: sentences, curves, costs, expert maps, table and sample. Opens from disk."""
    template = files("tenfold.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    models = report["models"]
    table = [(label, [form.format(model[field]) for model in models.values()]) for label, field, form in ROWS]
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            report=report,
            rival_names=plots.NAMES,
            names=[plots.NAMES[name] for name in models],
            table=table,
            curves=plots.learning_curves(models),
            costs=plots.token_costs(models),
            load=plots.expert_load(report["experts"]),
            preferences=plots.preferences(report["experts"]),
        )
    )
