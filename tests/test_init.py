"""Going on from a model: `tenfold train --init`."""

from pathlib import Path

import pytest
import torch
from random_families import random_fields
from test_parity_transformers import build

from tenfold.checkpoint import load_model, save_model
from tenfold.compare import compare
from tenfold.errors import TenfoldError
from tenfold.tokenizer import Tokenizer, load_tokenizer, train_bpe
from tenfold.train import train
from tenfold.train.settings import TrainSettings

VOCAB = 300


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the cat sat on the mat and the dog sat on the log\n" * 400)
    return file


@pytest.fixture(scope="module")
def parent(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 whose vocabulary has room beside its tokenizer's, with a predictor."""
    folder = tmp_path_factory.mktemp("parent") / "m"
    fields = random_fields("deepseek_v3", 1) | {"vocab_size": VOCAB, "initializer_range": 0.02}
    raw = train_bpe(iter([text.read_text()]), VOCAB - 20)
    save_model(build(fields), folder, Tokenizer(raw, {"eos_token": "<|endoftext|>"}))
    return folder


def settings(text: Path, parent: Path, **changes: object) -> TrainSettings:
    return TrainSettings(
        init=str(parent), data=[str(text)], tokens=10 * 4 * 16, seq_len=16, batch_size=4,
        evaluations=1, precision="float32", **changes,
    )  # fmt: skip


@pytest.mark.parametrize("mtp_loss", [0.0, 0.3])
def test_it_goes_on_from_those_weights(text: Path, parent: Path, mtp_loss: float, tmp_path: Path) -> None:
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    train(settings(text, parent, mtp_loss=mtp_loss, **still), tmp_path / "still", resume=False)
    before, after = load_model(parent), load_model(tmp_path / "still" / "model")
    assert after.config.model_type == "deepseek_v3"
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, msg=name)
    saved = load_tokenizer(tmp_path / "still" / "model")
    assert saved.encode("the cat") == load_tokenizer(parent).encode("the cat")

    learnt = settings(text, parent, mtp_loss=mtp_loss)
    train(learnt, tmp_path / "learnt", resume=False)
    after = load_model(tmp_path / "learnt" / "model")
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
    same = torch.equal(after.mtp[0].eh_proj.weight, before.mtp[0].eh_proj.weight)
    assert same is (mtp_loss == 0)


def test_what_does_not_go_with_it_is_refused(text: Path, parent: Path, tmp_path: Path) -> None:
    overridden = settings(text, parent, model={"num_hidden_layers": 1})
    with pytest.raises(TenfoldError, match="init names has its shape"):
        train(overridden, tmp_path / "a", resume=False)
    with pytest.raises(TenfoldError, match="leave it out"):
        compare(settings(text, parent), tmp_path / "b", resume=False)
    large = tmp_path / "large"
    large.mkdir()
    words = " ".join(f"{number:x}" for number in range(5000))
    Tokenizer(train_bpe(iter([words]), 2 * VOCAB), {"eos_token": "<|endoftext|>"}).save(large)
    with pytest.raises(TenfoldError, match=f"{2 * VOCAB} tokens, more than the vocab_size {VOCAB}"):
        train(settings(text, parent, tokenizer=large), tmp_path / "c", resume=False)
    with pytest.raises(TenfoldError, match="no such file"):
        train(settings(text, tmp_path / "nowhere"), tmp_path / "d", resume=False)
