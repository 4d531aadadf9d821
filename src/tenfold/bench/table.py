"""What `bench` found, for people."""

from typing import Any

from rich import box
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tenfold.memory import size

BAR_WIDTH = 8


def report(found: dict[str, Any]) -> Group:
    """The machine's ceilings, then the model's figures with how much of a ceiling each reaches."""
    if "curve" in found:
        return Group(_curve(found))
    return Group(_ceilings(found), _model(found)) if "model" in found else Group(_ceilings(found))


def _ceilings(found: dict[str, Any]) -> Table:
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    table = _table(f"this machine with {threads}, {found['isa'] or 'torch'}", "at most")
    rows = {
        "memory read": ("read_bandwidth_bytes_per_second", "GB/s"),
        "int8 products": ("int8_ops_per_second", "GOP/s"),
        "bf16 products": ("bf16_flops_per_second", "GFLOP/s"),
        "fp32 products": ("fp32_flops_per_second", "GFLOP/s"),
        "disk read, uncached": ("disk_read_bytes_per_second", "GB/s"),
    }
    for label, (name, unit) in rows.items():
        if found[name] is not None:
            table.add_row(label, _number(found[name] / 1e9, unit))
    return table


def _model(found: dict[str, Any]) -> Table:
    formats = ", ".join(f"{part} {form}" for part, form in found["formats"].items())
    title = f"{found['model']}: {found['num_hidden_layers']} layers, {formats}, {found['backend']} kernels"
    table = _table(title, f"batch {found['batch']}", "", "of the ceiling")
    form = found["formats"].get("experts", found["formats"]["rest"])
    kind = {"bf16": "bf16", "float32": "fp32"}.get(form, "int8")
    speeds = {
        "decode": ("decode_fraction_of_bandwidth", "memory read"),
        "prefill": (f"prefill_fraction_of_{kind}_peak", kind),
    }
    for label, (fraction, ceiling) in speeds.items():
        speed = _number(found[f"{label}_tokens_per_second"], "tokens/s")
        table.add_row(label, speed, *_bar(found[fraction], ceiling))
    if (overhead := found["python_overhead_fraction"]) is not None:
        table.add_row("outside the kernels", f"{100 * overhead:.1f}%")
    table.add_row("weights read a token", _number(found["weight_bytes_per_token"] / 1e6, "MB"))
    if experts := found["experts_per_layer_and_step"]:
        table.add_row("experts a layer and step", f"{experts:.3g}", "expected")
    table.add_row("load", _number(found["load_seconds"], "s"))
    table.add_row("peak memory", _number(found["peak_memory_bytes"] / 1e9, "GB"))
    return table


def _curve(found: dict[str, Any]) -> Table:
    first = found["curve"][0]
    of = f"{found['model']}: {first['memory']['experts']:,} experts, batch {first['batch']}, random tokens"
    table = Table(
        title=Text(f"{of}; decode, the disk's bound on it and prefill in tokens/s"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    columns = ("memory", "experts\nheld", "hits", "MB read\na token", "disk\nGB/s")
    for column in (*columns, "decode", "disk's\nbound", "prefill"):
        table.add_column(column, justify="right", no_wrap=True)
    for point in found["curve"]:
        memory, decode, bound = point["memory"], point["decode"], point["bound_tokens_per_second"]
        table.add_row(
            size(memory["budget_bytes"]),
            f"{memory['experts_held']:,}",
            "" if decode["hit_rate"] is None else f"{decode['hit_rate']:.0%}",
            _digits(decode["disk_bytes_per_token"] / 1e6),
            _digits(point["disk_read_bytes_per_second"] / 1e9),
            _digits(decode["tokens_per_second"]),
            _digits(bound) if bound else "",
            _digits(point["prompt"]["tokens_per_second"]),
        )
    return table


def _bar(fraction: float | None, ceiling: str) -> list[ProgressBar | str]:
    if fraction is None:
        return []
    return [ProgressBar(1.0, min(fraction, 1.0), BAR_WIDTH), f"{100 * fraction:.0f}% of {ceiling}"]


def _digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float, unit: str) -> str:
    return f"{value:,.4g} {unit}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(no_wrap=True)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number == 0 else "left", no_wrap=True)
    return table
