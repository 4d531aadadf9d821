"""What `eval` found at tasks, for people."""

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def table(found: dict[str, Any]) -> Table:
    """A row a metric: its value ± standard error, where lm-eval knows one."""
    rows = Table(title=Text(found["model"]), title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("task", "few-shot", "metric", "value ± stderr"):
        rows.add_column(name, justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for task, metrics in found["results"].items():
        label: list[Text | str] = [Text(metrics.get("alias", task)), str(found["n-shot"].get(task, ""))]
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            rows.add_row(*label, name if kind == "none" else f"{name} ({kind})", f"{_number(value)}{spread}")
            label = ["", ""]
    return rows


def _number(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else str(value)
