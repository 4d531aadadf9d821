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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.files import new_folder, read_json, write_json, write_text, writing
from tenfold.model.transformer import Transformer
from tenfold.train.settings import TrainSettings

RESULT_FIELDS = {"total_params", "tokens", "curve", "seq_len", "seed", "precision", "data_key", "vocab_size"}


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
        elif self.path.exists() and (not self.path.is_dir() or any(self._strangers())):
            raise TenfoldError(f"{self.path} exists and is not a tenfold run; choose another --out")
        else:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_json(record, identity)

    def _strangers(self) -> Iterator[Path]:
        """What is here and is not the beginning of a run that died while it was starting."""
        return (path for path in self.path.iterdir() if not path.name.startswith(".run.json."))

    def _check_same(self, old: Any, new: dict[str, Any]) -> None:
        if not isinstance(old, dict) or not all(isinstance(part, dict) for part in old.values()):
            raise TenfoldError(f"{self.path / 'run.json'}: not the record of a tenfold run")
        for part in new:
            there = _defaults(part) | old.get(part, {})
            for name in new[part]:
                if there.get(name) != new[part][name]:
                    raise TenfoldError(
                        f"{self.path} belongs to another run: {part}.{name} is"
                        f" {there.get(name)!r} there and {new[part][name]!r} here;"
                        " choose another --out"
                    )

    def read_result(self) -> dict[str, Any]:
        """What result.json holds, and the `path` of the model. Raises TenfoldError if it is not that."""
        result = read_json(self.result)
        if not isinstance(result, dict) or not result.keys() >= RESULT_FIELDS:
            raise TenfoldError(f"{self.result}: not the result of a tenfold run")
        return {**result, "path": str(self.model)}

    def latest(self) -> Path | None:
        """The newest checkpoint. One that was being written when the run died has another name."""
        found = sorted(self.checkpoints.glob("step-*"))
        return found[-1] if found else None

    def save(self, model: Transformer, optimizers: list[Optimizer], progress: Progress, keep: int) -> None:
        weights, optimizer = get_state_dict(model, optimizers)
        with new_folder(self.checkpoints / f"step-{progress.step:08d}") as folder:
            _save_state({"model": weights, "optimizer": optimizer}, folder)
            write_json(folder / "progress.json", asdict(progress))
        for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)

    def restore(self, model: Transformer, optimizers: list[Optimizer]) -> Progress:
        """Load the newest checkpoint, if any, and forget what was logged after it."""
        self._clear_leftovers()
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
        except (Exception, CheckpointException) as error:
            raise TenfoldError(
                f"{checkpoint}: the checkpoint cannot be read ({type(error).__name__}); delete it to"
                " resume from the one before"
            ) from error
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=optimizer)
        self._cut_metrics(progress.step)
        return progress

    def _clear_leftovers(self) -> None:
        """Remove what a run that was killed in the middle of writing left under temporary names."""
        for leftover in (*self.checkpoints.glob(".step-*"), *self.path.glob(".*.*")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

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


def _defaults(part: str) -> dict[str, Any]:
    """Of a part of run.json, as JSON: what a tenfold that had no such field yet did."""
    kinds: dict[str, type[BaseModel]] = {"settings": TrainSettings, "config": ModelConfig}
    if part not in kinds:
        return {}
    values: dict[str, Any] = kinds[part].model_construct().model_dump(mode="json")
    return values


def _save_state(state: dict[str, Any], folder: Path) -> None:
    """torch.distributed.checkpoint wraps whatever went wrong; unwrap it, so that a full disk is named."""
    try:
        with _alone():
            state_dict_saver.save(state, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError | KeyboardInterrupt):
            raise cause from None
        raise TenfoldError(f"{folder.parent}: a checkpoint cannot be written ({cause})") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch.distributed's warning that there is one process: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
