"""The training loop."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.checkpoint import save_model
from tenfold.checkpoint.families import NATIVE, family_for, why_native
from tenfold.config import ModelConfig
from tenfold.device import autocast, pick_device, pick_precision
from tenfold.errors import TenfoldError
from tenfold.evaluate import bits_per_byte
from tenfold.files import write_json
from tenfold.model.router import RouterAux
from tenfold.model.transformer import Transformer
from tenfold.train import balance
from tenfold.train.data import TokenData, TrainOrder
from tenfold.train.metrics import RoutingMeter
from tenfold.train.optimizer import build_optimizers, schedule, set_learning_rate
from tenfold.train.reporter import Reporter
from tenfold.train.settings import TrainSettings
from tenfold.train.state import Progress, RunFolder

HEAD_TOKENS = 1024


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: the run stopped after a whole step and saved a checkpoint."""


class Trainer:
    """One run: a model, its data, and the folder it is kept in.

    Raises TenfoldError if the folder belongs to something else, or the text is too short.
    """

    def __init__(
        self, config: ModelConfig, settings: TrainSettings, data: TokenData, out: Path, resume: bool
    ):
        if settings.bias_update_rate and (config.router != "sigmoid" or not config.is_sparse):
            raise TenfoldError("bias_update_rate: only a sigmoid router has the bias; set it to 0")
        self.device = pick_device(settings.device)
        precision = pick_precision(settings.precision, self.device)
        self.settings = settings.model_copy(update={"precision": precision})
        self.data = data
        self.config = config
        self.order = TrainOrder(data.train, settings.seq_len, settings.seed)
        self.folder = RunFolder(out)
        self.folder.open(self._identity(), resume)
        self.model = Transformer(config).init_weights(settings.seed).to(self.device)
        self.optimizers = build_optimizers(self.model, self.settings)
        self.progress = self.folder.restore(self.model, self.optimizers)
        self.bias_update = self._attach_bias_update()
        if settings.compile:
            self.model.hidden_states = torch.compile(self.model.hidden_states)  # type: ignore[method-assign]

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        names = {"preset", "model", "data", "tokenizer", "device"}
        return {
            "settings": self.settings.model_dump(mode="json", exclude=names),
            "config": self.config.model_dump(mode="json"),
            "data": {"key": self.data.key},
        }

    def _attach_bias_update(self) -> balance.BiasUpdate | None:
        rate = self.settings.bias_update_rate
        if not rate:
            return None
        update = balance.BiasUpdate(self.model, rate)
        update.attach(self.optimizers[0])
        return update

    def run(self, label: str = "train") -> dict[str, Any]:
        """Train to the end, save the model, and return (and keep in result.json) what it cost."""
        if self.folder.result.is_file():
            return dict(json.loads(self.folder.result.read_text()))
        steps = self.settings.steps
        with Reporter(self.folder, label, self.progress.step, steps) as reporter:
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
        loss = balance_loss = 0.0
        for row in range(0, settings.batch_size, settings.rows):
            inputs, targets = self.order.batch(step * settings.batch_size + row, settings.rows)
            inputs, targets = inputs.to(self.device), targets.to(self.device)
            layers, part, balance_part = backward(self.model, inputs, targets, settings)
            loss, balance_loss = loss + part, balance_loss + balance_part
            meter.observe(layers)
            if self.bias_update:
                self.bias_update.observe(layers)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(loss, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        record: dict[str, Any] = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": settings.learning_rate * factor,
        }
        if meter.loads:
            record |= {"balance_loss": balance_loss, **meter.summary()}
        return record

    def _not_finite(self, loss: float, norm: float) -> None:
        last = self.folder.latest()
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was due before it"
        raise TenfoldError(
            f"training stopped at step {self.progress.step + 1}: loss {loss}, gradient norm {norm};"
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

    def _finish(self) -> dict[str, Any]:
        if not self.folder.model.exists():
            save_model(self.model, self.folder.model, self.data.tokenizer.raw)
        result = summarize(self.config, self.settings, self.progress) | {
            "data_key": self.data.key,
            "path": str(self.folder.model),
            "saved_as": saved_as(self.config),
        }
        write_json(self.folder.result, result)
        return result


def backward(
    model: Transformer, inputs_BS: Tensor, targets_BS: Tensor, settings: TrainSettings
) -> tuple[list[RouterAux], float, float]:
    """Add one micro-batch's gradient.

    Returns what the routers did, and the micro-batch's share of the step's two losses: cross-entropy
    (nats per token) and balance.
    """
    share = len(inputs_BS) / settings.batch_size
    with autocast(inputs_BS.device, settings.precision):
        hidden_BSD, layers = model.hidden_states(inputs_BS)
    loss, hidden_grad = head_loss(model, hidden_BSD, targets_BS, share, settings.precision)
    balance_loss = share * balance.total_loss(layers, settings)
    if layers:
        torch.autograd.backward([hidden_BSD, balance_loss], [hidden_grad, None])
    else:
        hidden_BSD.backward(hidden_grad)
    return layers, loss, balance_loss.item()


def head_loss(
    model: Transformer, hidden_BSD: Tensor, targets_BS: Tensor, share: float, precision: str
) -> tuple[float, Tensor]:
    """`share` times the mean cross-entropy, and its gradient on `hidden_BSD`; adds the head's gradient.

    A thousand tokens at a time: the logits of a whole micro-batch would be the largest tensor of the
    step, and on the CPU mostly page faults (LOG.md).
    """
    leaf = hidden_BSD.detach().requires_grad_()
    tokens, loss = targets_BS.numel(), 0.0
    for hidden, targets in zip(
        leaf.flatten(0, 1).split(HEAD_TOKENS), targets_BS.flatten().split(HEAD_TOKENS), strict=True
    ):
        with autocast(hidden.device, precision):
            logits = model.lm_head(hidden)
        part = F.cross_entropy(logits.float(), targets, reduction="sum") * (share / tokens)
        part.backward()
        loss += part.item()
    assert leaf.grad is not None
    return loss, leaf.grad


def saved_as(config: ModelConfig) -> str:
    """The Hugging Face architecture a model is saved as; if it is tenfold's own, why."""
    family = family_for(config)
    if family is NATIVE:
        return f"{family.architecture} (no published family has {why_native(config)})"
    return family.architecture


def summarize(config: ModelConfig, settings: TrainSettings, progress: Progress) -> dict[str, Any]:
    """What a finished run cost and reached; names as in report.json."""
    tokens = progress.step * settings.step_tokens
    return {
        "total_params": config.num_params(),
        "active_params": config.num_active_params(),
        "tokens": tokens,
        "train_flops": tokens * config.train_flops_per_token(settings.seq_len),
        "train_seconds": progress.seconds,
        "train_tokens_per_second": tokens / progress.seconds,
        "val_bits_per_byte": progress.curve[-1]["bits_per_byte"],
        "curve": progress.curve,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "precision": settings.precision,
    }
