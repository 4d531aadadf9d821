"""A server that says what the page expects of tenfold's, made up, and does what a prompt tells it to."""

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

PAGE = files("tenfold.server").joinpath("page/index.html")
POLICY = "default-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:"
TEXT = (
    "A mixture of experts is a bakery with many bakers. For each loaf a foreman picks a few of them, "
    "those who know this kind of dough, and the others rest. So the bakery can know a great deal "
    "without everyone working on every loaf: what it costs to bake one is the work of the few who were "
    "called.\n\nThat is why such a model has many parameters, and uses only a small share of them for "
    "each token."
)


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, layers: int = 16, experts: int = 64, chosen: int = 8, delay: float = 0.01) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.layers, self.experts, self.chosen, self.delay = layers, experts, chosen, delay
        self.text = TEXT
        self.template = True
        self.key: str | None = None
        self.requests: list[dict[str, Any]] = []
        self.cancelled = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def facts(self) -> dict[str, Any]:
        sparse = self.layers > 0
        facts = {
            "name": "made-up-7b-a1b" if sparse else "dense-1b",
            "context": 4096,
            "vocab_size": 50304,
            "num_params": 6_919_161_856,
            "num_active_params": 1_281_951_744 if sparse else 6_919_161_856,
            "num_layers": self.layers,
            "sparse_layers": list(range(self.layers)),
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "memory_bytes": 4 * 2**30,
            "chat_template": self.template,
        }
        load = {"running": 0, "waiting": 0, "memory_bytes": int(3.71 * 2**30)}
        return {"facts": facts, "load": load}

    def events(self, chat: bool) -> Iterator[dict[str, Any]]:
        rng = random.Random(len(self.requests))
        routes = [rng.sample(range(self.experts), self.chosen) for _ in range(self.layers)]
        fame = [[rng.paretovariate(1.2) for _ in range(self.experts)] for _ in routes]
        pieces = re.findall(r" ?[^\s]{1,6}|\s", self.text)
        for number, piece in enumerate(pieces):
            stay = rng.random()
            for chosen, weights in zip(routes, fame, strict=True):
                for slot, other in enumerate(rng.choices(range(self.experts), weights, k=self.chosen)):
                    if rng.random() > stay and other not in chosen:
                        chosen[slot] = other
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            choice |= {"delta": {"content": piece}} if chat else {"text": piece}
            if number == len(pieces) - 1:
                choice["finish_reason"] = "stop"
            token = {"id": number, "text": piece, "experts": [list(chosen) for chosen in routes]}
            yield {"choices": [choice], "tenfold": {"tokens": [token]}}
        meter = {
            "active_parameters": 1_281_951_744,
            "weight_bytes_used": 9 * 2**30,
            "weight_bytes_read": 83 * 2**20,
            "distinct_experts": 700,
            "expert_hit_rate": 0.972,
            "compute_seconds": 4.1,
            "cost": 0.00021,
        }
        usage = {"prompt_tokens": 12, "completion_tokens": len(pieces), "tenfold": meter}
        yield {"choices": [], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return False
        self.answer(401, {"error": {"message": "wrong API key"}})
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            return self.answer(200, PAGE.read_text())
        if self.refused():
            return None
        return self.answer(200, self.server.facts())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return None
        self.server.requests.append(body)
        chat = "messages" in body
        if chat and not self.server.template:
            return self.answer(400, {"error": {"message": "this model has no chat template"}})
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        if "queue" in prompt:
            return self.answer(429, {"error": {"message": "the queue is full"}}, Retry_After="3")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for number, event in enumerate(self.server.events(chat)):
                if number == 20 and "break" in prompt:
                    return None
                if number == 20 and "fail" in prompt:
                    event = {"error": {"message": "The disk no longer answers."}}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(self.server.delay)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.cancelled.set()
