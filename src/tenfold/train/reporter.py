"""What a run shows and keeps while it goes: progress bar, metrics.jsonl, TensorBoard, Ctrl-C."""

import json
import signal
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tenfold.train.state import RunFolder


class Reporter:
    """A context around the loop. After Ctrl-C, `stop_requested` is true; a second one stops at once."""

    def __init__(self, folder: RunFolder, label: str, step: int, steps: int, layers: list[int]):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(label, total=steps, completed=step, state="")
        self.label = label
        self.layers = layers
        self.board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)
        self.stop_requested = False

    def __enter__(self) -> Self:
        self.lines = self.folder.metrics.open("a", encoding="utf-8")
        self._previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._on_interrupt)
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
        signal.signal(signal.SIGINT, self._previous)
        self.lines.close()
        self.board.close()

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.console.print(f"{self.label}: stopping after this step; Ctrl-C again stops at once")

    def log(self, record: dict[str, Any]) -> None:
        """One step: a line of JSON, TensorBoard scalars (per-layer lists by layer), the bar."""
        self.lines.write(json.dumps(record) + "\n")
        self.lines.flush()
        for name, value in record.items():
            if isinstance(value, list):
                for layer, number in zip(self.layers, value, strict=True):
                    self.board.add_scalar(f"{name}/layer{layer}", number, record["step"])
            else:
                self.board.add_scalar(name, value, record["step"])
        self.bar.update(self.task, completed=record["step"], state=_state(record))
        if "bits_per_byte" in record:
            self.console.print(
                f"{self.label}: {record['tokens']:,} tokens, {record['bits_per_byte']:.4f} bits/byte,"
                f" {record['seconds']:.0f} s"
            )


def _state(record: dict[str, Any]) -> str:
    state = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s"
    if "load_cv" in record:
        state += f"  load cv {max(record['load_cv']):.2f}"
    return state
