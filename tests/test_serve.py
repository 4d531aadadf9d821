"""`tenfold serve` as whoever runs it meets it: a process, a small model with random weights, signals."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served_model import write_served_model
from test_server import HELLO, PARAMETERS, client_of, wait_until

TENFOLD = [sys.executable, "-c", "from tenfold.cli import main; main()"]


def started(model: Path, *options: str) -> tuple["subprocess.Popen[str]", str]:
    """A server, and its URL."""
    arguments = [*TENFOLD, "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    found = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert found, process.stderr.read()
    return process, found[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served"), context=768)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    process, url = started(model, "--memory", "2GiB", "--price-per-hour", "3.6", "--model-name", "tiny")
    yield url
    process.terminate()
    assert process.wait(20) == 0


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def complete(client: openai.OpenAI, prompt: str, **options: Any) -> str:
    return client.completions.create(model="tiny", prompt=prompt, **options).choices[0].text


def test_greedy_text_is_that_of_generate(client: openai.OpenAI, model: Path) -> None:
    options = ["--prompt", "def read(", "--temperature", "0", "--max-tokens", "30", "--json"]
    done = subprocess.run([*TENFOLD, "generate", str(model), *options], capture_output=True, check=True)
    wanted = json.loads(done.stdout)["text"]
    assert complete(client, "def read(", temperature=0, max_tokens=30) == wanted
    stream = client.completions.create(
        model="tiny", prompt="def read(", temperature=0, max_tokens=30, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_seeded_text_is_the_same_alone_and_among_others(client: openai.OpenAI, url: str) -> None:
    options: dict[str, Any] = {"seed": 5, "temperature": 0.9, "max_tokens": 25, "n": 2}

    async def among_others() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as other:
            create = other.completions.create
            asked = create(model="tiny", prompt="import os", **options)
            noise = [
                create(model="tiny", prompt="x" * (1 + 9 * i), max_tokens=5 + 3 * i, n=1 + i % 3)
                for i in range(15)
            ]
            answer, *_ = await asyncio.gather(asked, *noise)
            return [choice.text for choice in answer.choices]

    alone = client.completions.create(model="tiny", prompt="import os", **options)
    texts = [choice.text for choice in alone.choices]
    assert asyncio.run(among_others()) == texts and texts[0] != texts[1]


def test_formats_are_kept_by_random_weights(client: openai.OpenAI) -> None:
    schema = {**PARAMETERS, "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "additionalProperties": False}
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,  # type: ignore[arg-type]
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
        max_tokens=300,
        temperature=0,
    )
    content = answer.choices[0].message.content
    assert json.loads(content or "")["city"] in ("Rome", "Oslo") and answer.choices[0].finish_reason == "stop"
    text = complete(client, "x", extra_body={"guided_regex": "[ab]{3}c"}, max_tokens=20)
    assert re.fullmatch("[ab]{3}c", text)
    with pytest.raises(openai.BadRequestError, match="regex"):
        complete(client, "x", extra_body={"guided_regex": "("})
    with pytest.raises(openai.BadRequestError):
        complete(client, "x", extra_body={"guided_regex": "((a{99}){99}){99}"})


@pytest.mark.parametrize("stream", [False, True])
def test_random_weights_call_the_tool_that_they_must(client: openai.OpenAI, stream: bool) -> None:
    schema = {**PARAMETERS, "properties": {"city": {"enum": ["Rome"]}}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    answer: Any = client.chat.completions.create(
        model="tiny",
        messages=HELLO,  # type: ignore[arg-type]
        tools=[tool],  # type: ignore[list-item]
        tool_choice="required",
        max_tokens=300,
        stream=stream,
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        reason, calls = chunks[-1].finish_reason, [c for x in chunks for c in x.delta.tool_calls or ()]
    else:
        reason, calls = answer.choices[0].finish_reason, answer.choices[0].message.tool_calls
    assert reason == "tool_calls" and len(calls) == 1 and calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments) == {"city": "Rome"}


def test_log_probabilities_of_a_prompt_do_not_depend_on_where_it_ends(client: openai.OpenAI) -> None:
    ids = [5, 77, 203, 19, 44, 150]
    answer = client.completions.create(
        model="tiny", prompt=[ids, ids[:4]], echo=True, logprobs=2, max_tokens=1, temperature=0
    )
    whole, part = [choice.logprobs for choice in answer.choices]
    assert whole and part and whole.token_logprobs and part.token_logprobs
    assert len(whole.token_logprobs) == len(ids) + 1 and whole.token_logprobs[0] is None
    assert part.token_logprobs[1:4] == pytest.approx(whole.token_logprobs[1:4], abs=1e-4)
    assert all(
        told >= max(top.values()) for told, top in [(whole.token_logprobs[-1], whole.top_logprobs[-1])]
    )  # type: ignore[index,union-attr]


def test_the_meter_of_a_real_model(client: openai.OpenAI, url: str) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "extra_body": {"return_experts": True, "ignore_eos": True}}
    answer = client.completions.create(model="tiny", prompt="import os", **options)
    facts = httpx.get(f"{url}/v1/tenfold").json()["facts"]
    meter = answer.usage.model_extra["tenfold"]  # type: ignore[union-attr,index]
    assert facts["name"] == "tiny" and meter["active_parameters"] == facts["num_active_params"]
    assert 0 < meter["distinct_experts"] <= facts["num_experts"] * len(facts["sparse_layers"])
    assert meter["weight_bytes_used"] > 0 and 0 <= meter["expert_hit_rate"] <= 1
    assert meter["cost"] == pytest.approx(meter["cost_input"] + meter["cost_output"]) and meter["cost"] > 0
    told = [
        token
        for chunk in client.completions.create(model="tiny", prompt="import os", stream=True, **options)
        for token in (chunk.model_extra or {}).get("tenfold", {}).get("tokens", ())
    ]
    assert len(told) == 8
    assert all(len(token["experts"]) == len(facts["sparse_layers"]) for token in told)
    assert all(len(chosen) == facts["num_experts_per_tok"] for token in told for chosen in token["experts"])


def test_running_requests_end_before_the_server_does(model: Path) -> None:
    process, url = started(model)
    client = client_of(url)
    options: dict[str, Any] = {"max_tokens": 240, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="small", prompt="x", stream=True, **options)
    pieces = [next(stream)]
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model="small", prompt="y")
    assert refused.value.status_code == 503 and refused.value.code == "draining"
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert process.wait(20) == 0 and process.stderr is not None and process.stderr.read() == ""


def test_a_second_ctrl_c_ends_at_once(model: Path) -> None:
    process, url = started(model)
    options: dict[str, Any] = {"n": 16, "max_tokens": 250, "extra_body": {"ignore_eos": True}}
    stream = client_of(url).completions.create(model="small", prompt="x", stream=True, **options)
    next(stream)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT


def test_a_port_that_is_taken_is_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run([*TENFOLD, "serve", str(model), "--port", port], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"cannot listen on 127.0.0.1, port {port}" in done.stderr


def test_bad_settings_are_one_line() -> None:
    wrong = (["--price-per-kwh", "1"], ["--port", "99999"], ["--max-sequences", "0"], ["--api-key", ""])
    for options in wrong:
        done = subprocess.run([*TENFOLD, "serve", "nowhere", *options], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


FORGOTTEN = """
import sys
import time
from tenfold.engine.request import Request
from tenfold.memory import Budget
from tenfold.sampling import SamplingParams
from tenfold.server.serve import ServeSettings, open_engine

engine = open_engine(sys.argv[1], Budget(), ServeSettings())
engine.submit(Request([1, 2, 3], SamplingParams(max_tokens=700, temperature=0, ignore_eos=True)))
while not engine.load().running:
    time.sleep(0.01)
"""


def test_an_engine_that_nobody_closed_lets_python_end(model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORGOTTEN, model], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
