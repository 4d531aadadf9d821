"""What the benchmarks that have targets print: a row for each, ours against a peer."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from tenfold.config import ModelConfig
from tenfold.presets import load_preset
from tenfold.switch_config import decoder_only

Row = dict[str, Any]
Bench = TypeVar("Bench")


def row(name: str, ours: float, peer: float | None, target: float | None, unit: str = "tok/s") -> Row:
    ratio = ours / peer if peer else None
    return {"name": name, "ours": ours, "peer": peer, "ratio": ratio, "target": target, "unit": unit}


def print_rows(parts: Mapping[str, Callable[[Bench], Iterator[Row]]], bench: Bench, as_json: bool) -> None:
    """Measure and print, each row as soon as it is known, or all of them as one JSON object."""
    found = []
    for part in parts.values():
        for each in part(bench):
            found.append(each)
            if not as_json:
                print(_line(each), flush=True)
    if as_json:
        print(json.dumps({"rows": found}))


def _line(found: Row) -> str:
    peer = f"{found['peer']:>9,.2f}" if found["peer"] is not None else " " * 9
    ratio = f"{found['ratio']:.3f}x" if found["ratio"] is not None else ""
    target = f" (target {found['target']})" if found["target"] is not None else ""
    return f"{found['name']:<70} {found['ours']:>9,.2f} {peer} {found['unit']:<5} {ratio}{target}"


def preset(name: str) -> ModelConfig:
    return decoder_only(load_preset(name), name)
