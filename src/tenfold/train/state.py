"""A run's folder and its checkpoints: written whole, pruned, and resumed to the bit.

run.json         settings, model config and data key: what the run is
metrics.jsonl    one line a step
result.json      written at the end
checkpoints/     step-00000100/, through torch.distributed.checkpoint
model/           the trained model, a Hugging Face directory
"""

import json
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from tenfold.errors import TenfoldError
from tenfold.files import new_folder, read_json, write_json, write_text, writing
from tenfold.model.transformer import Transformer


@dataclass
class Progress:
    """Where a run stands. `curve` holds its validation points."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class RunFolder:
    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.model = path / "model"

    def open(self, identity: dict[str, Any], resume: bool) -> None:
        """Start a new run here, or with `resume` go on with the one that is here.

        Raises TenfoldError if the folder holds something else: nothing in it is touched.
        """
        record = self.path / "run.json"
        if record.is_file():
            if not resume:
                raise TenfoldError(
                    f"{self.path} already holds a run; continue it with --resume, or choose another --out"
                )
            self._check_same(read_json(record), json.loads(json.dumps(identity)))
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise TenfoldError(f"{self.path} exists and is not a tenfold run; choose another --out")
        else:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_json(record, identity)

    def _check_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for part in new:
            for name in new[part]:
                if old.get(part, {}).get(name) != new[part][name]:
                    raise TenfoldError(
                        f"{self.path} belongs to another run: {part}.{name} is"
                        f" {old.get(part, {}).get(name)!r} there and {new[part][name]!r} here;"
                        " choose another --out"
                    )

    def latest(self) -> Path | None:
        """The newest checkpoint. One that was being written when the run died has another name."""
        found = sorted(self.checkpoints.glob("step-*"))
        return found[-1] if found else None

    def save(self, model: Transformer, optimizers: list[Optimizer], progress: Progress, keep: int) -> None:
        weights, optimizer = get_state_dict(model, optimizers)
        with new_folder(self.checkpoints / f"step-{progress.step:08d}") as folder:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                state = {"model": weights, "optimizer": optimizer}
                state_dict_saver.save(state, checkpoint_id=folder, no_dist=True)
            write_json(folder / "progress.json", asdict(progress))
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def restore(self, model: Transformer, optimizers: list[Optimizer]) -> Progress:
        """Load the newest checkpoint, if any, and forget what was logged after it."""
        for leftover in (*self.checkpoints.glob(".step-*"), *self.path.glob(".model.*")):
            shutil.rmtree(leftover, ignore_errors=True)
        checkpoint = self.latest()
        if checkpoint is None:
            self._cut_metrics(0)
            return Progress()
        weights, optimizer = get_state_dict(model, optimizers)
        try:
            progress = Progress(**read_json(checkpoint / "progress.json"))
            state_dict_loader.load(
                {"model": weights, "optimizer": optimizer}, checkpoint_id=checkpoint, no_dist=True
            )
        except Exception as error:
            raise TenfoldError(
                f"{checkpoint}: the checkpoint cannot be read ({type(error).__name__}); delete it to"
                " resume from the one before"
            ) from error
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=optimizer)
        self._cut_metrics(progress.step)
        return progress

    def _cut_metrics(self, step: int) -> None:
        """Drop the lines of steps that will be run again, and a line that was cut off."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [
            line
            for line in lines
            if line.endswith("\n") and int(re.match(r'{"step": (\d+)', line).group(1)) <= step  # type: ignore[union-attr]
        ]
        write_text(self.metrics, "".join(kept))
