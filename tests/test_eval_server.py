"""lm-eval against the server, as a client of OpenAI's API: the scores of its class for transformers."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from test_eval import ALL, MODELS, assert_same, new_tokenizer, of_transformers, quicker, recorded, write_tasks
from test_packed_engine import build

from tenfold.checkpoint import save_model

__all__ = ["quicker"]  # a fixture for all tests here too


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With room for every text: what is too long is cut for a server one token shorter than for a model."""
    folder = tmp_path_factory.mktemp("eval_server")
    tokenizer = new_tokenizer("sparse")
    fields = {**MODELS["sparse"], "max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id}
    save_model(build(fields, 1), folder / "model", tokenizer)
    write_tasks(folder / "tasks", HFLM(str(folder / "model"), device="cpu", dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder / "model"


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """Of a server in a process of its own."""
    tenfold = [sys.executable, "-c", "from tenfold.cli import main; main()"]
    process = subprocess.Popen(
        [*tenfold, "serve", str(model), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert found
    yield found[0]
    process.terminate()
    assert process.wait(20) == 0


def of_server(address: str, model: Path, tasks: list[str], **arguments: Any) -> dict[str, Any]:
    """What lm-eval says with its own class for servers."""
    found = simple_evaluate(
        model="local-completions",
        model_args={
            "base_url": f"{address}/v1/completions",
            "model": "model",
            "max_length": 512,
            "num_concurrent": 4,
            "eos_string": "</s>",
            **arguments,
        },
        tasks=tasks,
        task_manager=TaskManager(include_path=model.parent / "tasks", include_defaults=False),
        log_samples=False,
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("tasks", "arguments"),
    [
        (ALL, {"tokenizer_backend": "huggingface", "tokenizer": "MODEL"}),
        (["choose"], {"tokenizer_backend": "huggingface", "tokenizer": "MODEL", "tokenized_requests": False}),
        (["write"], {"tokenizer_backend": "none"}),
    ],
    ids=["tokens", "texts", "texts without a tokenizer"],
)
def test_scores_of_a_server_are_those_of_lm_evals_own_class(
    monkeypatch: pytest.MonkeyPatch, model: Path, address: str, tasks: list[str], arguments: dict[str, Any]
) -> None:
    theirs, ours = (recorded(monkeypatch, kind) for kind in (HFLM, LocalCompletionsAPI))
    wanted = of_transformers(model, model.parent / "tasks", tasks)
    arguments = {name: str(model) if value == "MODEL" else value for name, value in arguments.items()}
    assert_same(of_server(address, model, tasks, **arguments), wanted)
    for answer, right in zip(ours, theirs, strict=True):
        assert answer == (right if isinstance(right, str) else pytest.approx(right, rel=1e-5))
