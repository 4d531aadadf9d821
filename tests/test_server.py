"""The server as its clients see it: the `openai` package on a real socket, and bytes that no client sends."""

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
import uvicorn
from scripted_engine import ScriptedEngine

from tenfold.engine.request import Stopped
from tenfold.server import limits, streaming
from tenfold.server.app import make_app
from tenfold.server.settings import ServeSettings

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def served(engine: ScriptedEngine, **settings: object) -> Iterator[str]:
    """The URL of a server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            make_app(engine, ServeSettings(**settings)), log_level="warning", lifespan="off"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def client_of(url: str, key: str = "none", **options: object) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **options)


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine("the cat sat on the mat")


@pytest.fixture(scope="module")
def url(engine: ScriptedEngine) -> Iterator[str]:
    with served(engine, price_per_hour=3.6, watts=100) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def test_a_chat(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(
        model="toy",
        messages=[{"role": "system", "content": "be brief"}, *HELLO],
        max_completion_tokens=50,
        temperature=0.5,
        seed=7,
        stop=["\n"],
        logit_bias={"5": -100},
        extra_body={"top_k": 9, "min_p": 0.1, "unknown": [1]},
    )
    (choice,) = answer.choices
    assert choice.message.content == "the cat sat on the mat" and choice.finish_reason == "stop"
    assert answer.model == "toy" and answer.id.startswith("chatcmpl-")
    asked = engine.requests[-1]
    assert engine.tokenizer.decode(asked.prompt_ids).endswith("hello<|im_end|>\n<|im_start|>assistant\n")
    assert asked.params.seed == 7 and asked.params.top_k == 9 and asked.params.logit_bias == {"5": -100}
    usage = answer.usage
    assert usage and usage.prompt_tokens == len(asked.prompt_ids) and usage.completion_tokens > 0
    assert usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens == 1
    meter = usage.model_extra["tenfold"]  # type: ignore[index]
    assert meter["active_parameters"] == 100 and meter["expert_hit_rate"] == pytest.approx(2 / 3)
    assert meter["cost_input"] == pytest.approx(0.001 * 0.5)
    assert meter["cost"] == pytest.approx(meter["cost_input"] + meter["cost_output"])
    assert meter["cost_per_million_input"] == pytest.approx(0.001 * 0.5 / usage.prompt_tokens * 1e6)


def test_streams(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_experts": True},
        )
    )
    said = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(said) == "the cat sat on the mat" and len(said) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens > 0
    told = [c.model_extra["tenfold"]["tokens"][0] for c in chunks if "tenfold" in (c.model_extra or {})]
    assert "".join(token["text"] for token in told) == "the cat sat on the mat"
    texts = client.completions.create(model="toy", prompt="x", stream=True, n=2)
    by_choice = {0: "", 1: ""}
    for chunk in texts:
        by_choice[chunk.choices[0].index] += chunk.choices[0].text
    assert by_choice == {0: "the cat sat on the mat", 1: "the cat sat on the mat"}


def test_log_probabilities(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="toy", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content and len(content) == 3 and all(len(one.top_logprobs) == 2 for one in content)
    assert bytes(content[0].bytes or []).decode() == content[0].token
    text = client.completions.create(
        model="toy", prompt=["the cat", "on"], echo=True, logprobs=1, max_tokens=0
    )
    first, second = text.choices
    assert first.text == "the cat" and first.finish_reason == "length"
    told = first.logprobs
    assert told and told.tokens and "".join(told.tokens) == "the cat"
    assert told.token_logprobs and told.token_logprobs[0] is None and told.token_logprobs[1] == -0.5
    assert told.text_offset and told.text_offset[0] == 0 and second.text == "on"
    assert text.usage and text.usage.completion_tokens == 0


def test_tools(client: openai.OpenAI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "reply", lambda request, index: f"Let me look.{CALL}")
    answer = client.chat.completions.create(model="toy", messages=HELLO, tools=TOOLS)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.content == "Let me look."
    (call,) = message.tool_calls or []
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Rome"}
    chunks = list(client.chat.completions.create(model="toy", messages=HELLO, tools=TOOLS, stream=True))
    calls = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert calls[0].function.name == "weather" and chunks[-1].choices[0].finish_reason == "tool_calls"
    none = client.chat.completions.create(model="toy", messages=HELLO, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.tool_calls is None
    back = [
        *HELLO,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    client.chat.completions.create(model="toy", messages=back, tools=TOOLS)
    assert "sunny" in engine.tokenizer.decode(engine.requests[-1].prompt_ids)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_forced(
    client: openai.OpenAI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, choice: object
) -> None:
    rest = CALL.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    monkeypatch.setattr(engine, "reply", lambda request, index: rest)
    answer = client.chat.completions.create(model="toy", messages=HELLO, tools=TOOLS, tool_choice=choice)  # type: ignore[arg-type]
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather"
    assert engine.requests[-1].constraint and "weather" in engine.requests[-1].constraint.text


def test_formats_become_constraints(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    schema = {"name": "city", "schema": PARAMETERS, "strict": True}
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": schema}):
        client.chat.completions.create(model="toy", messages=HELLO, response_format=form)  # type: ignore[call-overload]
        constraint = engine.requests[-1].constraint
        assert constraint and constraint.kind == "json_schema"
    assert json.loads(constraint.text).items() >= PARAMETERS.items()
    client.completions.create(model="toy", prompt="x", extra_body={"guided_regex": "[ab]+"})
    assert engine.requests[-1].constraint.kind == "regex"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"n": 10**9}, "n"),
        ({"max_tokens": 10**8}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"prompt": [10**12]}, "prompt"),
        ({"prompt": [[1, -1]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"stop": ["x"] * 10**5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"guided_regex": "a", "guided_grammar": "b"}, None),
        ({"guided_json": "bad"}, None),
        ({"best_of": 3}, None),
        ({"prompt": ["x"] * 100, "n": 100}, None),
        ({"prompt": ["x"] * 10**5}, "prompt"),
        ({"prompt": "\ud800"}, None),
        ({"prompt": "x " * 5000}, None),
        ({"prompt": [5] * 3000}, None),
    ],
)
def test_what_is_wrong_is_said(url: str, body: dict[str, object], field: str | None) -> None:
    data = json.dumps({"model": "toy", "prompt": "x", **body}).encode()
    answer = httpx.post(f"{url}/v1/completions", content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    if field:
        assert error["param"].startswith(field) and len(error["message"]) < 1100


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"[" * 10**5,
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"a":' * 10**4,
    ],
    ids=["empty", "half", "not UTF-8", "NaN", "deep", "infinite", "deep objects"],
)
def test_what_is_no_json(url: str, body: bytes) -> None:
    answer = httpx.post(f"{url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages"),
        ([{"role": "king", "content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content"),
        ([{"role": "user", "content": "forbidden"}], "not that"),
        ([{"role": "user", "content": "slow"}], "template"),
    ],
)
def test_messages_that_cannot_be_rendered(client: openai.OpenAI, messages: object, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="toy", messages=messages)  # type: ignore[call-overload]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as found:
        client.completions.create(model="other", prompt="x")
    assert found.value.code == "model_not_found"


def test_without_a_template_there_is_no_chat() -> None:
    with served(ScriptedEngine(template=None)) as url, pytest.raises(openai.BadRequestError, match="chat"):
        client_of(url).chat.completions.create(model="toy", messages=HELLO)  # type: ignore[arg-type]


def test_keys() -> None:
    with served(ScriptedEngine(), api_key=["secret", "other"]) as url:
        assert client_of(url, "other").models.list().data
        for key in ("wrong", "secre"):
            with pytest.raises(openai.AuthenticationError):
                client_of(url, key).completions.create(model="toy", prompt="x")
        assert httpx.get(f"{url}/health").status_code == 200


def test_other_origins_only_if_asked_for(url: str) -> None:
    headers = {"Origin": "https://example.com"}
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=headers).headers
    with served(ScriptedEngine(), cors_origin=["https://example.com"]) as other:
        allowed = httpx.get(f"{other}/v1/models", headers=headers).headers
        assert allowed["access-control-allow-origin"] == "https://example.com"


def test_a_body_has_a_limit_whatever_it_says_of_its_length() -> None:
    with served(ScriptedEngine(), max_body_bytes=1000) as url:
        large = b'{"prompt": "' + b"x" * 2000 + b'"}'
        for content in (large, iter([large[:900], large[900:]])):
            answer = httpx.post(f"{url}/v1/completions", content=content)
            assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]


def test_a_full_queue() -> None:
    with served(ScriptedEngine(room=0)) as url:
        with pytest.raises(openai.RateLimitError) as refused:
            client_of(url).completions.create(model="toy", prompt="x")
        assert refused.value.response.headers["retry-after"] and refused.value.code == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_time(stream: bool) -> None:
    engine = ScriptedEngine("the cat " * 200, delay=0.05)
    with served(engine, request_timeout=0.3) as url:
        if stream:
            with pytest.raises(openai.APIError, match="longer than this server allows"):
                list(client_of(url).completions.create(model="toy", prompt="x", max_tokens=900, stream=True))
        else:
            with pytest.raises(openai.InternalServerError) as found:
                client_of(url).completions.create(model="toy", prompt="x", max_tokens=900)
            assert found.value.status_code == 504
        wait_until(lambda: not engine.running)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_cancelled(stream: bool) -> None:
    engine = ScriptedEngine("the cat " * 500, delay=0.02)
    with served(engine) as url:
        client = client_of(url, timeout=0.5)
        with pytest.raises((openai.APITimeoutError, RuntimeError)):
            answer = client.completions.create(model="toy", prompt="x", max_tokens=2000, stream=stream)
            next(iter(answer))
            answer.close()
            raise RuntimeError
        wait_until(lambda: engine.answers and not engine.running)


def test_health_metrics_and_description(url: str, client: openai.OpenAI) -> None:
    client.completions.create(model="toy", prompt="x")
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{url}/metrics").text
    assert 'tenfold_requests_total{endpoint="/v1/completions",status="200"}' in metrics
    for name in (
        "running_requests",
        "waiting_requests",
        "generated_tokens_total",
        "prompt_tokens_total",
        "time_to_first_token_seconds_bucket",
        "time_between_tokens_seconds_bucket",
        "batch_tokens",
        "kv_cache_usage",
        "expert_hit_rate",
        "disk_bytes_total",
        "preemptions_total",
    ):
        assert f"tenfold_{name}" in metrics
    assert "/v1/chat/completions" in httpx.get(f"{url}/openapi.json").json()["paths"]
    page = httpx.get(url)
    assert (
        "text/html" in page.headers["content-type"] and "http" not in page.headers["content-security-policy"]
    )
    facts = httpx.get(f"{url}/v1/tenfold").json()
    assert facts["facts"]["num_experts"] == 8 and facts["prices"]["watts"] == 100


def test_paths_and_methods_that_are_not_there(url: str) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_body_has_a_time(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_who_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_LAST_SECONDS", 0.1)
    engine = ScriptedEngine("the cat sat on the mat " * 500, context=10**6)
    body = {"prompt": "x", "stream": True, "max_tokens": 10**5, "n": 100, "return_experts": True}
    with served(engine, request_timeout=1) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            content = json.dumps(body).encode()
            headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content)
            wait_until(lambda: engine.answers)
            wait_until(lambda: not engine.running)
        assert httpx.get(f"{url}/health").status_code == 200


def test_an_engine_that_failed_is_no_healthy_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(request: object) -> None:
        raise Stopped("the engine stopped: its disk is gone")

    engine = ScriptedEngine()
    monkeypatch.setattr(engine, "submit", failed)
    with served(engine) as url:
        engine.stopped = "its disk is gone"
        with pytest.raises(openai.InternalServerError, match="its disk is gone"):
            client_of(url).completions.create(model="toy", prompt="x")
        answer = httpx.get(f"{url}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})


def test_a_scored_prompt_is_followed_by_a_token(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """lm-eval leaves the last out, whatever it is."""
    for echo in (True, False):
        client.completions.create(model="toy", prompt="x", echo=echo, logprobs=1, max_tokens=1)
        assert engine.requests[-1].params.ignore_eos == echo


@pytest.mark.parametrize("large", ["logit_bias", "chat_template_kwargs", "stop", "messages", "tools"])
def test_a_million_mistakes_are_as_quick_as_one(url: str, large: str) -> None:
    """pydantic makes an error of each: half a gigabyte of them."""
    entries = {f"x{number}": {} for number in range(10**5)}
    many = entries if large in ("logit_bias", "chat_template_kwargs") else list(entries.values())
    answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": HELLO, large: many})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(large)
    assert len(answer.content) < 1000


def test_nothing_that_the_description_allows_is_a_fault_of_the_server(url: str) -> None:
    checks = "not_a_server_error,response_schema_conformance,content_type_conformance"
    options = ["--phases", "fuzzing", "--max-examples", "30", "--seed", "7", "--no-color", "--checks", checks]
    run = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *options]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


def test_several_users_at_once(url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        answer = await client.completions.create(model="toy", prompt=f"number {number}", max_tokens=20)
        return answer.choices[0].text

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(40)))

    assert set(asyncio.run(all_of_them())) == {"the cat sat on the mat"}


def wait_until(true: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
