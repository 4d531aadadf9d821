"""The command line as a person meets it: exit status, one line, nothing lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.cli import main
from tenfold.train import train as train_run
from tenfold.train.settings import TrainSettings


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `tenfold ARGUMENTS`."""
    old, sys.argv = sys.argv, ["tenfold", *map(str, arguments)]
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def trained(tiny: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train_run(tiny, out, resume=False)
    return out / "model"


def test_inspect_prints_the_stable_names(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    status, out, _ = run(capsys, "inspect", "olmoe-1b-7b", "--json")
    counts = json.loads(out)
    assert status == 0
    assert counts["total_params"] == 6_919_161_856
    assert counts["active_params"] == 1_282_017_280
    assert counts["active_params_without_input_embedding"] == 1_178_994_688
    status, out, _ = run(capsys, "inspect", trained)
    assert status == 0 and "Qwen3MoeForCausalLM" in out


def test_generate_streams_the_text_that_json_holds(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    options = ("--prompt", "def", "--max-tokens", 12, "--temperature", 0)
    status, plain, _ = run(capsys, "generate", trained, *options)
    _, out, _ = run(capsys, "generate", trained, *options, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["text"] + "\n" == plain
    assert len(found["tokens"]) == 12


def test_toml_and_command_line_are_one_schema(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, corpus: Path
) -> None:
    """The command line wins, field by field, the model's too."""
    file = tmp_path / "run.toml"
    file.write_text(
        f'data = ["{corpus}"]\ntokens = 256\nbatch_size = 4\nseq_len = 32\nlearning_rate = 0.5\n'
        "[model]\nvocab_size = 300\nhidden_size = 16\nnum_experts = 4\n"
    )
    out = tmp_path / "run"
    arguments = ("train", "--config", file, "--out", out, "--learning-rate", 0.001)
    status, _, err = run(capsys, *arguments, "--model.num-experts", 6, "--json")
    assert status == 0, err
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["learning_rate"] == 0.001
    assert record["settings"]["tokens"] == 256
    assert record["config"]["num_experts"] == 6
    assert record["config"]["hidden_size"] == 16


TRAIN = ("train", "--out", "OUT")
BAD = [
    (("train", "--out", "OUT", "--preset", "olmoe-1b-8b"), "olmoe-1b-7b"),
    ((*TRAIN, "--tokns", 3), "--tokens"),
    ((*TRAIN, "--model.num-expert", 3), "--model.num-experts"),
    ((*TRAIN, "--model.num-experts", 2, "--model.num-experts-per-tok", 3), "num_experts_per_tok 3"),
    ((*TRAIN, "--model.num-attention-heads", 3, "--model.num-key-value-heads", 2), "multiple of"),
    ((*TRAIN, "--model.head-dim", 3), "even"),
    ((*TRAIN, "--model.router", "best"), "expert_choice"),
    ((*TRAIN, "--tokens", "many"), "tokens"),
    ((*TRAIN, "--tokens", 5), "one step"),
    ((*TRAIN, "--batch-size", 6, "--micro-batch-size", 4), "divide"),
    ((*TRAIN, "--device", "abacus"), "abacus"),
    ((*TRAIN, "--data", "nowhere.txt"), "nowhere.txt"),
    ((*TRAIN, "--config", "nowhere.toml"), "TOML"),
    ((*TRAIN, "--seq-len", 4096, "--tokens", 10**6), "max_position_embeddings"),
    (("generate", "nowhere"), "nowhere"),
    (("inspect", "qwen3-30b"), "qwen3-30b-a3b"),
    (("trian",), "train"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    out = tmp_path / "out"
    status, _, err = run(capsys, *(out if a == "OUT" else a for a in arguments))
    assert status == 2
    assert words in err
    assert err.startswith("tenfold: ") and err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("words", ["", "interrupted; run it again"])
def test_ctrl_c_ends_with_a_line_and_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt(*[words] * bool(words))

    monkeypatch.setattr("tenfold.inspection.inspect", interrupted)
    assert run(capsys, "inspect", "demo") == (130, "", f"tenfold: {words or 'interrupted'}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"\x00\x01\x02", "NUL"), (b"too short", "give more")],
)
def test_bad_text_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    status, _, err = run(capsys, "train", "--out", tmp_path / "out", "--data", file)
    assert status == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_toml_mistakes_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    for text, words in (("tokns = 3", "--tokens"), ("tokens = [", "run.toml")):
        file.write_text(text)
        status, _, err = run(capsys, "train", "--config", file, "--out", tmp_path / "out")
        assert status == 2 and words in err and err.count("\n") == 1


def test_no_space_while_saving_keeps_what_was_there(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny: TrainSettings,
    tmp_path: Path,
) -> None:
    from torch.distributed.checkpoint import state_dict_saver

    from tenfold.errors import TenfoldError

    real, saves = state_dict_saver.save, []

    def full_disk(*arguments: object, **options: object) -> object:
        saves.append(1)
        if len(saves) == 3:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(state_dict_saver, "save", full_disk)
    out = tmp_path / "run"
    with pytest.raises(TenfoldError, match="no space left"):
        train_run(tiny, out, resume=False)
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == [
        "step-00000005",
        "step-00000010",
    ]
    monkeypatch.undo()
    assert train_run(tiny, out, resume=True)["tokens"] == 24 * 4 * 32


@pytest.mark.parametrize("code", ["import tenfold", "from tenfold.cli import app"])
def test_the_command_line_does_not_import_torch(code: str) -> None:
    """`tenfold --help` must answer at once; the clock is in benchmarks/startup.py."""
    check = f"{code}; import sys; heavy = {{'torch', 'numpy', 'matplotlib', 'datasets', 'rich.progress'}}"
    check += " & sys.modules.keys(); assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_readmes_python_takes_paths_as_text(trained: Path) -> None:
    import torch

    import tenfold

    model, tokenizer = tenfold.load_model(str(trained)), tenfold.load_tokenizer(str(trained))
    ids = tokenizer.encode("import os")
    assert model(torch.tensor([ids])).shape == (1, len(ids), model.config.vocab_size)
