"""What a trace says, as a table for people."""

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

POLICIES = {"lru": "LRU", "fitted": "LRU, fitted", "lfu": "LFU", "belady": "optimum"}


def table(found: dict[str, Any]) -> Group:
    """Hit rates by memory, and below them what the routers' choices have in common."""
    of = f"{found['num_experts_per_tok']} of {found['num_experts']} experts in {len(found['layers'])} layers"
    rates = Table(box=box.SIMPLE_HEAD)
    for name in ("experts in memory", "MB", *POLICIES.values()):
        rates.add_column(name, justify="right", no_wrap=True)
    for row in found["hit_rate"]:
        hits = (f"{row[policy]:.1%}" for policy in POLICIES)
        rates.add_row(f"{row['slots']:,} ({row['memory']:.0%})", f"{row['bytes'] / 1e6:,.4g}", *hits)
    lines = [f"repeated by the next token: {_spread(found['repeated'])}"]
    if found["lookahead"]:
        lines.append(f"foreseen a layer earlier: {_spread(found['lookahead'])}")
    return Group(Text(f"{found['model']}: {found['tokens']:,} tokens, {of}"), rates, Text("\n".join(lines)))


def _spread(shares: list[float]) -> str:
    """The mean over layers, and the worst and the best of them."""
    mean = sum(shares) / len(shares)
    return f"{mean:.1%} of a token's experts (by layer {min(shares):.1%} to {max(shares):.1%})"
