"""The training loop."""

import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from tenfold.checkpoint import load_decoder_only, save_model
from tenfold.config import ModelConfig
from tenfold.device import keep_freed_memory, pick_device, pick_precision
from tenfold.errors import TenfoldError
from tenfold.files import write_json
from tenfold.kernels import grouped_mm
from tenfold.model.transformer import Transformer
from tenfold.train import balance
from tenfold.train.data import TokenData, TrainOrder
from tenfold.train.loss import backward
from tenfold.train.metrics import RoutingMeter
from tenfold.train.optimizer import build_optimizers, schedule, set_learning_rate
from tenfold.train.reporter import Reporter
from tenfold.train.result import summarize
from tenfold.train.settings import TrainSettings, resolve_config
from tenfold.train.state import RunFolder
from tenfold.train.validation import bits_per_byte


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped after a whole step and saved a checkpoint."""


class Trainer:
    """One run: a model, its data, and the folder it is kept in.

    Raises TenfoldError if the folder belongs to something else, or the text is too short.
    """

    def __init__(
        self, config: ModelConfig, settings: TrainSettings, data: TokenData, out: Path, resume: bool
    ):
        if settings.bias_update_rate and config.is_sparse and config.router != "sigmoid":
            raise TenfoldError("bias_update_rate: only a sigmoid router has the bias; set it to 0")
        keep_freed_memory()
        self.device = pick_device(settings.device)
        precision = pick_precision(settings.precision, self.device)
        self.settings = settings.model_copy(update={"precision": precision})
        self.data = data
        self.config = config
        self.order = TrainOrder(data.train, settings.seq_len, settings.seed)
        self.folder = RunFolder(out)
        self.folder.open(self._identity(), resume)

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        names = {"preset", "model", "data", "tokenizer", "device", "checkpoint_every", "keep_checkpoints"}
        return {
            "settings": self.settings.model_dump(mode="json", exclude=names),
            "config": self.config.model_dump(mode="json"),
            "data": {"key": self.data.key},
        }

    def run(self, label: str = "train") -> dict[str, Any]:
        """Train to the end, save the model, and return (and keep in result.json) what it cost."""
        if self.folder.result.is_file():
            return self.folder.read_result()
        self._build()
        steps = self.settings.steps
        # The module that predicts ahead has a router too, and comes last.
        layers = self.config.sparse_layers
        if self.settings.mtp_loss and self.model.mtp:
            layers = [*layers, self.config.num_hidden_layers]
        with Reporter(self.folder, label, self.progress.step, steps, layers) as reporter:
            while self.progress.step < steps:
                record = self._timed_step()
                if self._due(self.settings.evaluations):
                    record["bits_per_byte"] = self._evaluate()
                reporter.log(record)
                finished = self.progress.step == steps
                if reporter.stop_requested and not finished:
                    self._save()
                    raise Interrupted(f"stopped at step {self.progress.step} of {steps}; go on with --resume")
                if finished or self.progress.step % self.settings.checkpoint_every == 0:
                    self._save()
        return self._finish()

    def _build(self) -> None:
        self.model = self._first_weights().to(self.device)
        self.optimizers = build_optimizers(self.model, self.settings)
        self.progress = self.folder.restore(self.model, self.optimizers)
        self.bias_update = None
        if self.settings.bias_update_rate and self.config.is_sparse:
            self.bias_update = balance.BiasUpdate(self.model, self.settings.bias_update_rate)
            self.bias_update.attach(self.optimizers[0])
        if self.settings.compile:
            # Run lengths are data, and inductor takes grouped_mm in bf16 alone. Not where it is defined:
            # the decorator imports 70 MB of compiler into every process.
            grouped_mm.experts = torch.compiler.disable(grouped_mm.experts)
            self.model.hidden_states = torch.compile(self.model.hidden_states)  # type: ignore[method-assign]

    def _first_weights(self) -> Transformer:
        if self.settings.init is None:
            return Transformer(self.config).init_weights(self.settings.seed)
        model = load_decoder_only(self.settings.init).train()
        model.mtp.requires_grad_(self.settings.mtp_loss > 0)
        return model

    def _due(self, times: int) -> bool:
        """True at `times` steps evenly spread, the last one among them."""
        step, steps = self.progress.step, self.settings.steps
        return step * times // steps > (step - 1) * times // steps

    def _timed_step(self) -> dict[str, Any]:
        start = time.perf_counter()
        record = self.step()
        seconds = time.perf_counter() - start
        self.progress.step += 1
        self.progress.seconds += seconds
        tokens = self.settings.step_tokens
        return {
            "step": self.progress.step,
            "tokens": self.progress.step * tokens,
            "seconds": self.progress.seconds,
            "tokens_per_second": tokens / seconds,
            **record,
        }

    def step(self) -> dict[str, Any]:
        """One optimizer step over a global batch. Returns what to log of it."""
        step, settings = self.progress.step, self.settings
        factor = schedule(step, settings)
        set_learning_rate(self.optimizers, factor)
        meter = RoutingMeter()
        losses: defaultdict[str, float] = defaultdict(float)
        for row in range(0, settings.batch_size, settings.rows):
            inputs, targets = self.order.batch(step * settings.batch_size + row, settings.rows)
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            layers, parts = backward(self.model, inputs, targets, settings)
            for name, part in parts.items():
                losses[name] += part
            meter.observe(layers)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm))
        if not all(map(math.isfinite, (norm, *losses.values()))):
            self._not_finite(losses, norm)
        if self.bias_update:
            self.bias_update.loads = meter.loads
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if not meter.loads:
            del losses["balance_loss"]
        return {
            **losses,
            "grad_norm": norm,
            "learning_rate": settings.learning_rate * factor,
            **(meter.summary() if meter.loads else {}),
        }

    def _not_finite(self, losses: dict[str, float], norm: float) -> None:
        last = self.folder.latest()
        found = ", ".join(f"{name} {value}" for name, value in losses.items())
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was due before it"
        raise TenfoldError(
            f"training stopped at step {self.progress.step + 1}: {found}, gradient norm {norm};"
            f" {kept}; try a lower learning_rate"
        )

    def _evaluate(self) -> float:
        settings = self.settings
        bits = bits_per_byte(self.model, self.data, settings.seq_len, settings.rows, settings.precision)
        tokens = self.progress.step * settings.step_tokens
        self.progress.curve.append(
            {
                "tokens": tokens,
                "flops": tokens * self.config.train_flops_per_token(settings.seq_len),
                "seconds": self.progress.seconds,
                "bits_per_byte": bits,
            }
        )
        return bits

    def _save(self) -> None:
        self.folder.save(self.model, self.optimizers, self.progress, self.settings.keep_checkpoints)

    def _data_asked_for(self) -> dict[str, Any]:
        """What `prepare` needs to find the same tokens again: a small text may fill no large vocabulary."""
        asked = resolve_config(self.settings).vocab_size
        return {"data_key": self.data.key, "vocab_size": asked}

    def _finish(self) -> dict[str, Any]:
        if not self.folder.model.exists():
            save_model(self.model, self.folder.model, self.data.tokenizer)
        result = summarize(self.config, self.settings, self.progress) | self._data_asked_for()
        write_json(self.folder.result, result)
        return self.folder.read_result()
