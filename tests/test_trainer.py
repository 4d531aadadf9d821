"""Training through `tenfold train`: it learns, stops, resumes to the bit, and refuses what it must."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenfold.checkpoint import load_model
from tenfold.errors import TenfoldError
from tenfold.train import train
from tenfold.train.settings import TrainSettings
from tenfold.train.trainer import Interrupted, Trainer

COMMAND = "from tenfold.cli import main; main()"


def losses(folder: Path) -> list[tuple[int, float]]:
    text = (folder / "metrics.jsonl").read_text()
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(tiny: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny, folder, resume=False)
    return folder


def test_it_learns_and_leaves_a_model(whole: Path) -> None:
    curve = losses(whole)
    assert [step for step, _ in curve] == list(range(1, 25))
    assert curve[-1][1] < curve[0][1] - 0.3
    result = json.loads((whole / "result.json").read_text())
    assert result["tokens"] == 24 * 4 * 32
    assert result["curve"][-1]["bits_per_byte"] == result["val_bits_per_byte"]
    assert len(result["curve"]) == 3
    assert load_model(whole / "model").config.num_experts == 8
    assert result["saved_as"] == "Qwen3MoeForCausalLM"
    assert len(list((whole / "checkpoints").iterdir())) == 2
    assert list((whole / "tensorboard").iterdir())


def test_routing_is_logged_for_each_layer(whole: Path) -> None:
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("load_cv", "max_vio", "dead_experts", "router_entropy", "dropped"):
        assert len(record[name]) == 1


def command(settings: TrainSettings, out: Path) -> list[str]:
    model = [f"--model.{k}={v}" for k, v in settings.model.model_dump(exclude_none=True).items()]
    fields = ("tokens", "batch_size", "seq_len", "evaluations", "checkpoint_every", "precision")
    options = [f"--{name}={getattr(settings, name)}" for name in (*fields, "bias_update_rate")]
    run = [sys.executable, "-c", COMMAND, "train", "--out", str(out), "--data", settings.data[0]]
    return [*run, *options, *model]


def kill_when(ready: Callable[[], bool], settings: TrainSettings, out: Path, environment: dict) -> None:
    """Start a run in another process, and kill -9 it as soon as `ready`."""
    process = subprocess.Popen(command(settings, out), env=environment, stderr=subprocess.DEVNULL)
    while not ready():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()


def resume(settings: TrainSettings, out: Path, environment: dict) -> None:
    done = subprocess.run([*command(settings, out), "--resume"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_killed_at_three_moments_and_resumed_the_losses_are_the_same(
    tiny: TrainSettings, tmp_path: Path
) -> None:
    """In bf16, on two threads, with the aux-loss-free bias: all that a run's state can hold.

    Killed before the first checkpoint, while one is being written, and between two.
    """
    sizes = tiny.model.model_dump(exclude_none=True) | {"router": "sigmoid"}
    changes = {"model": sizes, "precision": "bfloat16", "bias_update_rate": 0.01}
    settings = TrainSettings.model_validate(tiny.model_dump() | changes)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = subprocess.run(command(settings, whole), env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    checkpoints, metrics = out / "checkpoints", out / "metrics.jsonl"
    kill_when(lambda: metrics.exists() and metrics.stat().st_size > 0, settings, out, environment)
    resuming = [*command(settings, out), "--resume"]
    for ready in (
        lambda: any(checkpoints.glob(".step-*")),
        lambda: len(losses(out)) > 12 and any(checkpoints.glob("step-*")),
    ):
        process = subprocess.Popen(resuming, env=environment, stderr=subprocess.DEVNULL)
        while not ready() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resume(settings, out, environment)
    assert losses(out) == losses(whole)
    assert not [*out.glob(".*"), *checkpoints.glob(".*")]


def test_killed_while_it_starts_the_folder_can_be_used(tiny: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / ".run.json.1234abcd").write_text("{")
    assert train(tiny, tmp_path, resume=False)["tokens"] == 24 * 4 * 32
    assert not list(tmp_path.glob(".*"))


def test_micro_batches_see_the_same_tokens_and_reach_the_same_losses(
    whole: Path, tiny: TrainSettings, tmp_path: Path
) -> None:
    # Balance losses see a micro-batch's loads, not the step's: without them the sums must agree.
    off = {"balance_loss": 0.0, "z_loss": 0.0}
    one = tiny.model_copy(update=off)
    two = tiny.model_copy(update={**off, "micro_batch_size": 2})
    train(one, tmp_path / "one", resume=False)
    train(two, tmp_path / "two", resume=False)
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_ctrl_c_saves_and_resumes(whole: Path, tiny: TrainSettings, tmp_path: Path) -> None:
    class Interrupting(Trainer):
        def step(self) -> dict[str, object]:
            if self.progress.step == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    from tenfold.train.data import prepare, with_tokenizer
    from tenfold.train.settings import resolve_config

    data = prepare(tiny.data, None, 300)
    config = with_tokenizer(resolve_config(tiny), data)
    with pytest.raises(Interrupted, match="step 8 of 24"):
        Interrupting(config, tiny, data, tmp_path / "run", resume=False).run()
    train(tiny, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_finished_run_is_not_run_again(whole: Path, tiny: TrainSettings) -> None:
    before = (whole / "metrics.jsonl").stat().st_mtime_ns
    saved = json.loads((whole / "result.json").read_text())
    assert train(tiny, whole, resume=True) == saved | {"path": str(whole / "model")}
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == before


def test_another_runs_folder_is_refused(whole: Path, tiny: TrainSettings) -> None:
    with pytest.raises(TenfoldError, match="--resume"):
        train(tiny, whole, resume=False)
    other = tiny.model_copy(update={"seed": 5})
    with pytest.raises(TenfoldError, match=r"settings\.seed is 0 there and 5 here"):
        train(other, whole, resume=True)


def test_a_run_from_before_a_field_was_there_is_the_same_run(
    whole: Path, tiny: TrainSettings, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    record = json.loads((old / "run.json").read_text())
    del record["settings"]["locality_loss"], record["config"]["layer_types"], record["config"]["n_group"]
    (old / "run.json").write_text(json.dumps(record))
    assert train(tiny, old, resume=True)["tokens"] == 24 * 4 * 32
    local = tiny.model_copy(update={"locality_loss": 0.5})
    with pytest.raises(TenfoldError, match=r"settings\.locality_loss is 0\.0 there and 0\.5 here"):
        train(local, old, resume=True)


def test_a_folder_of_other_things_is_refused(tiny: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TenfoldError, match="not a tenfold run"):
        train(tiny, tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_checkpoint_is_named(tiny: TrainSettings, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "result.json").unlink()
    last = max((out / "checkpoints").iterdir())
    for file in last.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TenfoldError, match=last.name):
        train(tiny, out, resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tiny: TrainSettings, tmp_path: Path
) -> None:
    class Diverging(Trainer):
        def step(self) -> dict[str, object]:
            if self.progress.step == 12:
                with torch.no_grad():
                    self.model.lm_head.weight.fill_(float("nan"))
            return super().step()

    from tenfold.train.data import prepare, with_tokenizer
    from tenfold.train.settings import resolve_config

    data = prepare(tiny.data, None, 300)
    config = with_tokenizer(resolve_config(tiny), data)
    with pytest.raises(TenfoldError, match=r"step 13.*step-00000010"):
        Diverging(config, tiny, data, tmp_path / "run", resume=False).run()
    assert (tmp_path / "run/checkpoints/step-00000010").is_dir()


def test_bias_update_needs_a_sigmoid_router(tiny: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(TenfoldError, match="bias_update_rate"):
        train(tiny.model_copy(update={"bias_update_rate": 0.1}), tmp_path / "run", resume=False)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adamw"},
        {"precision": "bfloat16"},
        {"compile": True},
    ],
)
def test_options_train_too(change: dict[str, object], tiny: TrainSettings, tmp_path: Path) -> None:
    short = tiny.model_copy(update={"tokens": 3 * 4 * 32, **change})
    train(short, tmp_path / "run", resume=False)
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("router", ["switch", "expert_choice"])
def test_what_no_family_has_is_saved_as_tenfolds_own_and_says_so(
    router: str, tiny: TrainSettings, tmp_path: Path
) -> None:
    sizes = tiny.model.model_dump(exclude_none=True) | {"router": router}
    if router == "switch":
        sizes["num_experts_per_tok"] = 1
    changes = {"model": sizes, "tokens": 2 * 4 * 32}
    short = TrainSettings.model_validate(tiny.model_dump() | changes)
    result = train(short, tmp_path / "run", resume=False)
    assert result["saved_as"] == f"TenfoldForCausalLM (no published family has router {router})"
    assert load_model(result["path"]).config.router == router
