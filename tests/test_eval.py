"""The verb `eval`: the scores of lm-eval's own class for transformers, and perplexities of a plain loop."""

import json
import math
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.evaluator
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_cli import run
from test_packed_engine import build
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM

from tenfold import compiled
from tenfold.chat_template import ChatTemplate
from tenfold.checkpoint import save_model
from tenfold.checkpoint.pack.packing import pack
from tenfold.engine.batch import Chunk
from tenfold.engine.blocks import Blocks
from tenfold.engine.torch_batch import TorchBatchRunner, TorchPass
from tenfold.evaluate.lm_eval_model import TenfoldLM
from tenfold.evaluate.scoring import Scorer, Text
from tenfold.formats import Packing
from tenfold.tokenizer import Tokenizer, train_bpe
from tenfold.tokenizer.tokenizer import put_around

needs_kernels = pytest.mark.skipif(
    not compiled.available(), reason="no compiled kernels in this installation"
)

SHAPE = {
    "vocab_size": 330, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "initializer_range": 0.3,
}  # fmt: skip
SPARSE_SHAPE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "dense": {**SHAPE, "model_type": "llama", "intermediate_size": 48, "qk_norm": "none"},
    "sparse": {**SHAPE, "model_type": "qwen3_moe", **SPARSE_SHAPE},
}
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "birds",
    "that",
    "sang",
    "of",
    "sun",
    "and",
    "rain",
    "over",
    "green",
    "hills",
]
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}<s>{% endif %}[{{ m.role }}] {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(length))


def new_tokenizer(name: str) -> Tokenizer:
    """The dense model's begins every text with a token; the sparse one's neither that nor a system role."""
    raw = train_bpe(iter([sentence(n, 40) for n in range(50)]), 320)
    raw.add_special_tokens(["<s>", "</s>"])
    special = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if name == "dense" else {})
    put_around(raw, special.get("bos_token"), None)
    template = TEMPLATE if name == "dense" else NO_SYSTEM + TEMPLATE.replace("m.content", "m.content | trim")
    return Tokenizer(raw, special, chat_template=ChatTemplate({"default": template}, "test"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Models by name, and in tasks/ a task of each kind."""
    folder = tmp_path_factory.mktemp("eval")
    for name, fields in MODELS.items():
        tokenizer = new_tokenizer(name)
        model = build({**fields, "eos_token_id": tokenizer.eos_token_id}, 1)
        save_model(model, folder / name, tokenizer)
    write_tasks(folder / "tasks", HFLM(str(folder / "dense"), device="cpu", dtype="float32"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


def write_tasks(folder: Path, knowing: HFLM) -> None:
    """Half the answers are what `knowing` writes."""
    folder.mkdir()
    questions: list[dict[str, Any]] = [
        {
            "question": sentence(n, 3 + n % 30),
            "choices": [sentence(n + k, 1 + k * (n % 3)) for k in range(2 + n % 3)],
            "answer": n % 2,
        }
        for n in range(24)
    ]
    stop = {"until": ["\n", " a", "b"], "max_gen_toks": 20}
    asked = [
        Instance("generate_until", {}, (f"Answer.\nQ: {row['question']}\nA:", stop), 0) for row in questions
    ]
    for n, answer in enumerate(knowing.generate_until(asked, disable_tqdm=True)):
        questions[n]["written"] = answer if n % 2 else "other"
    ask = {"doc_to_text": "Q: {{question}}\nA:", "description": "Answer.\n"}
    choices = {"doc_to_choice": "choices", "doc_to_target": "answer", "gen_prefix": "Well, "}
    write_task(
        folder, "choose", questions, "multiple_choice", ["acc", "acc_norm"],
        **ask, **choices, fewshot_split="test",
    )  # fmt: skip
    write_task(
        folder, "write", questions, "generate_until", ["exact_match"],
        **ask, doc_to_target="written", generation_kwargs=stop,
    )  # fmt: skip
    texts = [{"text": sentence(n, 5 + 37 * n)} for n in range(6)]
    write_task(
        folder, "predict", texts, "loglikelihood_rolling", ["word_perplexity", "bits_per_byte"],
        doc_to_text="", doc_to_target="text", num_fewshot=0,
    )  # fmt: skip
    (folder / "all.yaml").write_text('{"group": "all", "task": ["choose", "write", "predict"]}')


def write_task(
    folder: Path, name: str, rows: list[dict[str, Any]], kind: str, metrics: list[str], **fields: Any
) -> None:
    """The task, and its data beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields |= {"task": name, "output_type": kind, "metric_list": [{"metric": metric} for metric in metrics]}
    fields |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(json.dumps(fields | {"test_split": "test"}))  # which is YAML too


@pytest.fixture(autouse=True)
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval reads 14,000 tasks, and reports the packages that are installed, in 20 and 3 seconds."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda storage: None)
    real = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda *args, **options: real(*args, **{**options, "include_defaults": False}),
    )


def of_transformers(model: Path, tasks: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """What lm-eval says with its own model class."""
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        device="cpu",
        batch_size=3,
        log_samples=False,
        **options,
    )
    assert found is not None
    return found


def ours(capsys: pytest.CaptureFixture[str], model: Path, *options: object) -> dict[str, Any]:
    """What the verb prints."""
    capsys.readouterr()
    status, out, err = run(capsys, "eval", model, *options, "--json")
    assert status == 0, err
    return json.loads(out)


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for part in ("n-shot", "n-samples"):
        assert found[part] == wanted[part]
    for task, figures in wanted["results"].items():
        for name, figure in figures.items():
            close = pytest.approx(figure, rel=1e-5) if isinstance(figure, float) else figure
            assert found["results"][task][name] == close, (task, name)


ALL = ["choose", "write", "predict"]
WAYS: dict[str, tuple[list[object], dict[str, Any]]] = {
    "plain": ([], {}),
    "few-shot": (["--num-fewshot", 1, "--limit", 9], {"num_fewshot": 1, "limit": 9}),
    "chat": (["--num-fewshot", 1, "--apply-chat-template"], {"num_fewshot": 1, "apply_chat_template": True}),
}


def recorded(patch: pytest.MonkeyPatch, model_class: type[LM]) -> list[Any]:
    """What models of a class will have answered."""
    answers: list[Any] = []
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        real = getattr(model_class, name)

        def method(*arguments: Any, real: Any = real, **options: Any) -> list[Any]:
            found = real(*arguments, **options)
            answers.extend(found)
            return found

        patch.setattr(model_class, name, method)
    return answers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_scores_are_those_of_lm_evals_own_class(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, way: str
) -> None:
    """Many texts are longer than the context, and are cut alike."""
    arguments, options = WAYS[way]
    tasks = folder / "tasks"
    their_answers, our_answers = (recorded(monkeypatch, kind) for kind in (HFLM, TenfoldLM))
    wanted = of_transformers(folder / name, tasks, ALL, **options)
    found = ours(capsys, folder / name, "--tasks", ",".join(ALL), "--include-path", tasks, *arguments)
    assert_same(found, wanted)
    for theirs, ours_ in zip(their_answers, our_answers, strict=True):
        assert ours_ == (theirs if isinstance(theirs, str) else pytest.approx(theirs, rel=1e-5))
    assert 0 < wanted["results"]["choose"]["acc,none"] < 1
    if (name, way) == ("dense", "plain"):
        assert wanted["results"]["write"]["exact_match,none"] >= 0.5


def test_groups_are_reported_and_shown(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    options = ("--tasks", "al*", "--include-path", folder / "tasks", "--limit", 4)
    found = ours(capsys, folder / "sparse", *options)
    assert set(found["results"]) == {"all", *ALL}
    assert found["n-samples"]["choose"] == {"original": 24, "effective": 4}
    status, out, _ = run(capsys, "eval", folder / "sparse", *options)
    accuracy, spread = (found["results"]["choose"][f"acc{part},none"] for part in ("", "_stderr"))
    assert status == 0 and f"{accuracy:.4f} ± {spread:.4f}" in out


def test_nothing_is_fetched_where_tasks_are_local(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the hub's client is not told to stay offline."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"asked for {arguments}")

    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "fresh")
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ours(capsys, folder / "dense", "--tasks", "choose", "--include-path", folder / "tasks", "--limit", 2)


def test_what_tasks_print_is_not_in_the_json(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "loud.py").write_text("def shout(docs):\n    print('HELLO')\n    return docs\n")
    task = (folder / "tasks" / "choose.yaml").read_text().removesuffix("}")
    (tmp_path / "loud.yaml").write_text(f"{task}, process_docs: !function loud.shout}}")
    status, out, err = run(
        capsys, "eval", folder / "dense", "--tasks", "choose", "--include-path", tmp_path, "--json"
    )
    assert status == 0 and json.loads(out) and "HELLO" in err


def test_a_question_is_read_once_for_all_its_answers(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is left over of a whole number of blocks."""
    rows = [
        {"question": sentence(n, 66), "choices": [sentence(k, 5) for k in range(6)], "answer": 0}
        for n in range(20)
    ]
    fields = {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    write_task(tmp_path, "long", rows, "multiple_choice", ["acc"], **fields)
    wanted = of_transformers(folder / "dense", tmp_path, ["long"])
    read = []
    real = TorchBatchRunner.begin

    def counted(runner: TorchBatchRunner, chunks: list[Chunk]) -> TorchPass:
        read.extend(len(chunk.ids) for chunk in chunks)
        return real(runner, chunks)

    monkeypatch.setattr(TorchBatchRunner, "begin", counted)
    found = ours(capsys, folder / "dense", "--tasks", "long", "--include-path", tmp_path)
    assert_same(found, wanted)
    encode = new_tokenizer("dense").encode
    whole = sum(len(encode(f"{row['question']} {choice}")) for row in rows for choice in row["choices"])
    assert sum(read) < whole / 2


SMALL = build({**MODELS["sparse"], "vocab_size": 7, "max_position_embeddings": 24}, 3)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
"""Of two kinds, so that many texts begin alike."""
TEXTS = st.lists(TOKENS.flatmap(lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))), max_size=8)


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS, blocks=st.integers(6, 12), tokens=st.integers(1, 30), logits=st.integers(1, 9))
def test_scores_do_not_depend_on_how_texts_are_cut_and_packed(
    texts: list[tuple[list[int], int]], blocks: int, tokens: int, logits: int
) -> None:
    runner = TorchBatchRunner(SMALL, blocks, block_size=4, max_tokens=tokens)
    scorer = Scorer(runner, Blocks(runner), context=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "_most_logits", logits)
        asked = [Text(ids, [(3 * n + wanted) % 7 for n in ids[-wanted:]]) for ids, wanted in texts]
        found = list(scorer.scores(asked))
    assert len(found) == len(asked)
    for text, score in zip(asked, found, strict=True):
        with torch.inference_mode():
            logprobs_SV = SMALL(torch.tensor([text.ids]))[0].log_softmax(-1)[-len(text.targets) :]
        wanted_S = torch.tensor(text.targets)
        assert score.logprob == pytest.approx(logprobs_SV.gather(1, wanted_S[:, None]).sum().item(), abs=1e-4)
        assert score.greedy == torch.equal(logprobs_SV.argmax(-1), wanted_S)


@needs_kernels
def test_a_packed_model_scores_as_the_one_it_was_made_of(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    """But for activations in bf16; and in a memory budget exactly as without."""
    packed = tmp_path / "packed"
    pack(folder / "sparse", packed, Packing(experts="bf16", rest="bf16"))
    options = ("--tasks", "predict,choose,write", "--include-path", folder / "tasks")
    wanted, found = (ours(capsys, model, *options)["results"] for model in (folder / "sparse", packed))
    bits = "bits_per_byte,none"
    assert found["predict"][bits] == pytest.approx(wanted["predict"][bits], rel=5e-3)
    assert found["choose"]["acc,none"] == pytest.approx(wanted["choose"]["acc,none"], abs=0.1)
    _, _, refused = run(capsys, "eval", packed, *options, "--memory", "1MiB")
    smallest = re.search(r"smallest that works is (\d+MiB)", refused)
    assert smallest, refused
    assert ours(capsys, packed, *options, "--memory", smallest[1])["results"] == found


# Perplexity


def plainly(model: Path, ids: list[int], context: int, stride: int) -> float:
    """Nats of each token in float64, by transformers, a token at a time from what its window shows of it."""
    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
    whole = [new_tokenizer(model.name).bos_token_id or judge.config.eos_token_id, *ids]
    nats, end = 0.0, 0
    for token in range(1, len(whole)):
        if token > end:
            end = min(end + (stride if end else context), len(ids))
        seen = torch.tensor([whole[max(0, end - context) : token]])
        with torch.inference_mode():
            nats -= judge(seen).logits[0, -1].log_softmax(-1)[whole[token]].item()
    return nats


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("dense", 30, {"context": 96, "stride": 48}),
        ("dense", 90, {"context": 20, "stride": 20}),
        ("sparse", 60, {"context": 32, "stride": 7}),
        ("sparse", 1, {"context": 5, "stride": 1}),
    ],
)
def test_perplexity_as_a_plain_loop_finds_it(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    name: str,
    words: int,
    options: dict[str, int],
) -> None:
    """Some words are not ASCII: a byte is not a character."""
    text = sentence(3, words) + " naïve 🙂"
    file = tmp_path / "text.txt"
    file.write_text(text)
    ids = new_tokenizer(name).encode(text, add_special_tokens=False)
    found = ours(
        capsys, folder / name, "--perplexity", file, *(f"--{key}={value}" for key, value in options.items()),
        "--batch-size", 3,
    )  # fmt: skip
    nats = plainly(folder / name, ids, **options)
    assert found["tokens"] == len(ids) and found["bytes"] == len(text.encode())
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_documents_are_predicted_each_for_itself(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    texts = [sentence(n, 9 * n + 1) for n in range(7)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    together = ours(capsys, folder / "dense", "--perplexity", tmp_path / "all.jsonl", "--batch-size", 4)
    alone = []
    for text in texts:
        (tmp_path / "one.txt").write_text(text)
        alone.append(ours(capsys, folder / "dense", "--perplexity", tmp_path / "one.txt"))
    bits = sum(found["bits_per_byte"] * found["bytes"] for found in alone)
    assert together["documents"] == 7
    assert together["bits_per_byte"] * together["bytes"] == pytest.approx(bits, rel=1e-6)


# What goes wrong

TASKS = ("--include-path", "TASKS", "--tasks")
BAD: list[tuple[tuple[object, ...], str]] = [
    ((), "give either --tasks or --perplexity"),
    (("--tasks", "x", "--perplexity", "y"), "give either --tasks or --perplexity"),
    ((*TASKS, "choos"), "near names are choose"),
    ((*TASKS, "choose,zzzzzz"), "`lm-eval ls tasks` lists them"),
    ((*TASKS, ""), "no task, group or tag"),
    ((*TASKS, "choose", "--stride", 3), "--stride belongs to --perplexity"),
    ((*TASKS, "write", "--context", 15), "20 new tokens, which leave no room"),
    ((*TASKS, "choose", "--context", 2), "tokens: it must have 1 to 2"),
    ((*TASKS, "choose", "--context", 97), "max_position_embeddings 96"),
    ((*TASKS, "choose", "--limit", 0), "limit"),
    (("--tasks", "choose", "--include-path", "nowhere"), "nowhere: no such folder"),
    (("--tasks", "choose", "--include-path", "."), "there is no task"),
    (("--perplexity", "nowhere.txt"), "nowhere.txt: no such file"),
    (("--perplexity", "empty.txt"), "empty"),
    (("--perplexity", "latin1.txt"), "not UTF-8"),
    (("--perplexity", "good.txt", "--stride", 97), "--stride 97 leaves tokens out: it must be 1 to 96"),
    (("--perplexity", "good.txt", "--limit", 3), "--limit belongs to --tasks"),
    (("--perplexity", "good.txt", "--num-fewshot", 0), "--num-fewshot belongs to --tasks"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[-40:])
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {"empty": b"", "latin1": "naïve".encode("latin1"), "good": b"the cat"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    arguments = tuple(folder / "tasks" if a == "TASKS" else a for a in arguments)
    status, out, err = run(capsys, "eval", folder / "dense", *arguments)
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("tenfold: ") and words in last


BROKEN = {
    "task: [": "not a task of lm-eval",
    '{"task": "own", "dataset_path": "json", "dataset_kwargs": {"data_files": "no.jsonl"}}': "own: FileNot",
    '{"task": "own", "dataset_path": "owner/name"}': "own: .*owner/name",
}


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_task_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "own.yaml").write_text(content)
    status, _, err = run(capsys, "eval", folder / "dense", "--tasks", "own", "--include-path", tmp_path)
    assert status == 2 and re.search(BROKEN[content], err.splitlines()[-1])


def test_without_lm_eval_its_extra_is_named(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, err = run(capsys, "eval", folder / "dense", "--tasks", "choose")
    assert status == 2 and "pip install 'tenfold[eval]'" in err and err.count("\n") == 1


@pytest.mark.parametrize("damage", ["no tokenizer", "no first token", "NaN"])
def test_models_that_cannot_be_evaluated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str
) -> None:
    model, tokenizer = build(MODELS["sparse"]), new_tokenizer("sparse")
    words = "tokenizer.json: no such file"
    if damage == "no first token":
        tokenizer, words = (
            Tokenizer(tokenizers.Tokenizer(WordLevel({"cat": 0}, "cat"))),
            "neither a bos_token nor an eos_token",
        )
    elif damage == "NaN":
        model.layers[1].post_attention_layernorm.weight.data[3] = math.nan
        words = "logits are NaN or infinite"
    save_model(model, tmp_path / "model", None if damage == "no tokenizer" else tokenizer)
    (tmp_path / "text.txt").write_text("the cat")
    status, _, err = run(capsys, "eval", tmp_path / "model", "--perplexity", tmp_path / "text.txt")
    assert status == 2 and words in err and err.count("\n") == 1
