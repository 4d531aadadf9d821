"""Training through `tenfold train`: it learns, stops, resumes to the bit, and refuses what it must."""

import json
import os
import signal
import subprocess
import sys
import time
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
    lines = (folder / "metrics.jsonl").read_text().splitlines()
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
    assert load_model(result["path"]).config.num_experts == 8
    assert result["saved_as"] == "Qwen3MoeForCausalLM"
    assert len(list((whole / "checkpoints").iterdir())) == 2
    assert list((whole / "tensorboard").iterdir())


def test_routing_is_logged_for_each_layer(whole: Path) -> None:
    record = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    for name in ("load_cv", "max_vio", "dead_experts", "router_entropy", "dropped"):
        assert len(record[name]) == 2


@pytest.mark.parametrize("delay", [0.0, 0.15])
def test_killed_and_resumed_the_losses_are_the_same(
    whole: Path, tiny: TrainSettings, tmp_path: Path, delay: float
) -> None:
    out = tmp_path / "run"
    model = [f"--model.{k}={v}" for k, v in tiny.model.model_dump(exclude_none=True).items()]
    fields = ("tokens", "batch_size", "seq_len", "evaluations", "checkpoint_every", "precision")
    options = [f"--{name}={getattr(tiny, name)}" for name in fields]
    command = [sys.executable, "-c", COMMAND, "train", "--out", str(out), *options, *model]
    command += ["--data", tiny.data[0]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists()
    finished = subprocess.run([*command, "--resume"], env=environment, capture_output=True)
    assert finished.returncode == 0, finished.stderr.decode()
    assert losses(out) == losses(whole)


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
    assert train(tiny, whole, resume=True) == json.loads((whole / "result.json").read_text())
    assert (whole / "metrics.jsonl").stat().st_mtime_ns == before


def test_another_runs_folder_is_refused(whole: Path, tiny: TrainSettings) -> None:
    with pytest.raises(TenfoldError, match="--resume"):
        train(tiny, whole, resume=False)
    other = tiny.model_copy(update={"seed": 5})
    with pytest.raises(TenfoldError, match=r"settings\.seed is 0 there and 5 here"):
        train(other, whole, resume=True)


def test_a_folder_of_other_things_is_refused(tiny: TrainSettings, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TenfoldError, match="not a tenfold run"):
        train(tiny, tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_checkpoint_is_named(tiny: TrainSettings, whole: Path, tmp_path: Path) -> None:
    import shutil

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
