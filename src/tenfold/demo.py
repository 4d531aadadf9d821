"""The whole story in minutes, offline: train a sparse model beside its dense twins, and report."""

from pathlib import Path
from typing import Any

from tenfold.compare import compare
from tenfold.train.settings import TrainSettings


def demo(out: Path, data: list[str], resume: bool) -> dict[str, Any]:
    """`compare` with the default settings on `data`. Returns what report.json holds."""
    return compare(TrainSettings(data=data), out, resume)
