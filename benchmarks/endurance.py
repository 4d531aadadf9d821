"""Does the server stay right, small and reachable under thousands of mixed requests?

    python benchmarks/endurance.py [--requests 2000] [--connections 32] [--memory SIZE] [--json]

A small sparse model with random weights. Good requests (greedy and seeded texts, streams, chats, schemas,
several texts at once, log-probabilities) must answer what the offline engine answers; bad ones (no JSON,
wrong types, too long, unknown models) with a 4xx and a message; streams that are closed early and
connections that are dropped must leave nothing behind. In the end the server is killed and started again.
"""

import argparse
import asyncio
import json
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from random_pack import write_random_pack
from rich.console import Console
from rich.progress import track
from rows import preset
from serve import Server, free_port, serve_command
from vocabulary import write_tokenizer

from tenfold.engine.llm import LLM
from tenfold.formats import Packing
from tenfold.sampling import SamplingParams

CONTEXT = 512
PROMPTS = [f"{'word ' * (1 + number % 40)}{number}" for number in range(24)]
SCHEMA = {"enum": ["yes", "no"]}
TIMEOUT = 120.0
Body = dict[str, Any]
Ask = Callable[["Client"], Awaitable[str]]


def params(number: int) -> SamplingParams:
    """Of the good request of that number: some greedy, some seeded."""
    seeded = {"temperature": 0.8, "top_p": 0.95, "seed": number} if number % 2 else {"temperature": 0.0}
    return SamplingParams(max_tokens=4 + number, ignore_eos=True, **seeded)


class Client:
    def __init__(self, url: str, right: list[str], seed: int):
        self.url, self.right, self.dice = url, right, random.Random(seed)
        self.http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT)

    def good(self) -> tuple[int, Body]:
        number = self.dice.randrange(len(PROMPTS))
        return number, {"prompt": PROMPTS[number], **params(number).model_dump(exclude_none=True)}

    async def post(self, body: Body, path: str = "/v1/completions") -> Any:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}"
        return answer.json()


async def text(client: Client) -> str:
    number, body = client.good()
    found = await client.post(body)
    assert found["choices"][0]["text"] == client.right[number], f"wrong text of {PROMPTS[number]!r}"
    return "right texts"


async def several(client: Client) -> str:
    number, body = client.good()
    found = await client.post(body | {"n": 3, "logprobs": 2})
    assert found["choices"][0]["text"] == client.right[number], "wrong first text of three"
    assert len(found["choices"]) == 3
    return "right texts of several"


async def stream(client: Client) -> str:
    number, body = client.good()
    made = ""
    async with client.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        async for piece in _pieces(answer):
            made += piece
    assert made == client.right[number], f"wrong stream of {PROMPTS[number]!r}"
    return "right streams"


async def cancelled(client: Client) -> str:
    _, body = client.good()
    longer = body | {"stream": True, "max_tokens": 300}
    async with client.http.stream("POST", "/v1/completions", json=longer) as answer:
        left = client.dice.randrange(6)
        async for _ in _pieces(answer):
            if (left := left - 1) < 0:
                break
    return "streams closed early"


async def dropped(client: Client) -> str:
    """The connection ends within the body, or as soon as the request is out."""
    _, body = client.good()
    data = json.dumps(body | {"max_tokens": 300}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    host, port = client.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(head + data[: client.dice.choice([len(data) // 2, len(data)])])
    await writer.drain()
    await asyncio.sleep(client.dice.random() / 20)
    writer.close()
    return "connections dropped"


async def chat(client: Client) -> str:
    said = [{"role": "user", "content": client.dice.choice(PROMPTS)}]
    found = await client.post({"messages": said, "max_tokens": 8, "seed": 1}, "/v1/chat/completions")
    assert found["choices"][0]["message"]["role"] == "assistant" and found["usage"]["completion_tokens"]
    return "chats"


async def schema(client: Client) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    said = [{"role": "user", "content": "yes or no?"}]
    body = {"messages": said, "max_tokens": 200, "response_format": form}
    found = await client.post(body, "/v1/chat/completions")
    answer = json.loads(found["choices"][0]["message"]["content"])
    assert answer in SCHEMA["enum"], f"not of the schema: {answer}"
    return "right schemas"


def bad(name: str, status: set[int], body: Body | bytes, path: str = "/v1/completions") -> Ask:
    async def ask(client: Client) -> str:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.http.post(path, content=data, headers={"Content-Type": "application/json"})
        assert answer.status_code in status, f"{name}: {answer.status_code} {answer.text[:200]}"
        assert answer.json()["error"]["message"], f"{name}: no message"
        return "bad requests refused"

    return ask


ASKS: list[tuple[Ask, int]] = [
    (text, 6),
    (several, 2),
    (stream, 5),
    (cancelled, 4),
    (dropped, 2),
    (chat, 2),
    (schema, 1),
    (bad("too long", {400}, {"prompt": "x" * (CONTEXT + 1)}), 1),
    (bad("far too long", {400, 413}, {"prompt": "x " * 400_000}), 1),
    (bad("no JSON", {400}, b'{"prompt": "x'), 1),
    (bad("no UTF-8", {400}, b'{"prompt": "\xff"}'), 1),
    (bad("wrong type", {400, 422}, {"prompt": {"a": 1}}), 1),
    (bad("huge n", {400, 422}, {"prompt": "x", "n": 10**9}), 1),
    (bad("no token", {400}, {"prompt": [10**9]}), 1),
    (bad("no model", {404}, {"prompt": "x", "model": "nobody"}), 1),
    (bad("no messages", {400, 422}, {"messages": []}, "/v1/chat/completions"), 1),
    (bad("no schema", {400}, {"prompt": "x", "guided_json": {"type": "nothing"}}), 1),
]


async def _pieces(answer: httpx.Response) -> Any:
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                yield choice["text"]


async def run(url: str, pid: int, right: list[str], requests: int, connections: int) -> dict[str, Any]:
    """All requests, over some connections at once: what was seen, and the server's memory as they went on."""
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    memory: list[int] = []
    numbers = iter(track(range(requests), "requests", console=Console(stderr=True)))
    asks, weights = zip(*ASKS, strict=True)

    async def connection(seed: int) -> None:
        client = Client(url, right, seed)
        for number in numbers:
            (ask,) = client.dice.choices(asks, weights)
            try:
                seen[await asyncio.wait_for(ask(client), TIMEOUT)] += 1
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            if number % 50 == 0:
                memory.append(_resident(pid))
        await client.http.aclose()

    await asyncio.gather(*(connection(seed) for seed in range(connections)))
    return {"seen": dict(seen), "wrong": wrong, "memory": memory, "left": await _left(url)}


async def _left(url: str) -> dict[str, int]:
    """What still runs or waits some seconds after the last request."""
    load: dict[str, int] = {}
    async with httpx.AsyncClient(base_url=url) as http:
        for _ in range(50):
            load = (await http.get("/v1/tenfold")).json()["load"]
            if not load["running"] + load["waiting"] + load["kv_blocks_used"]:
                break
            await asyncio.sleep(0.2)
    return {name: load[name] for name in ("running", "waiting", "kv_blocks_used")}


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def model(folder: Path) -> Path:
    config = preset("demo").model_copy(update={"max_position_embeddings": CONTEXT})
    out = folder / "small"
    write_random_pack(out, config, Packing(experts="q4", rest="q8"))
    write_tokenizer(out, config.vocab_size, chat=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--memory", help="a budget, so that experts are streamed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = model(Path(folder))
        llm = LLM(path)
        made = [llm.generate([prompt], params(number))[0] for number, prompt in enumerate(PROMPTS)]
        del llm
        options = ["--memory", arguments.memory] if arguments.memory else []
        port = free_port()
        command = serve_command(path, port, *options)
        server = Server(command, port, stack)
        right = [each.text for each in made]
        asked = run(server.url, server.process.pid, right, arguments.requests, arguments.connections)
        found = asyncio.run(asked)
        found["killed"] = _kill_and_start(server, command, port, stack, right)
    print(json.dumps(found) if arguments.json else _report(found))


def _kill_and_start(server: Server, command: list[str], port: int, stack: ExitStack, right: list[str]) -> Any:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    start = time.perf_counter()
    again = Server(command, port, stack)
    ready = time.perf_counter() - start
    body = {"prompt": PROMPTS[0], **params(0).model_dump(exclude_none=True)}
    answer = httpx.post(f"{again.url}/v1/completions", json=body, timeout=TIMEOUT).json()
    return {"ready_seconds": ready, "right": answer["choices"][0]["text"] == right[0]}


def _report(found: dict[str, Any]) -> str:
    memory = found["memory"]
    after = memory[len(memory) // 4 :]
    lines = [f"{name}: {count}" for name, count in sorted(found["seen"].items())]
    lines += [f"WRONG: {count} x {text}" for text, count in Counter(found["wrong"]).most_common(10)]
    lines.append(
        f"memory of the server: {memory[0] / 1e6:.0f} MB at first, {after[0] / 1e6:.0f} after a quarter,"
        f" {after[-1] / 1e6:.0f} in the end, {max(memory) / 1e6:.0f} at most"
    )
    lines.append(f"left afterwards: {found['left']}; after kill -9: {found['killed']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
