"""For all tests: transformers stays offline, caches stay in a temporary folder, tensors are tiny."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from tenfold.train.settings import TrainSettings

# A shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# With tensors this small a second thread only waits.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    os.environ["TENFOLD_CACHE"] = str(folder)
    yield folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small Python files with something to learn in them."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        lines = [f"def add_{number}_{i}(value):\n    return value + {i * number}\n\n" for i in range(20)]
        (folder / f"module_{number}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> TrainSettings:
    """A run of 24 steps that takes about a second."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    return TrainSettings.model_validate(
        {
            "model": sizes,
            "data": [str(corpus)],
            "tokens": 24 * 4 * 32,
            "batch_size": 4,
            "seq_len": 32,
            "evaluations": 3,
            "checkpoint_every": 5,
            "precision": "float32",
        }
    )
