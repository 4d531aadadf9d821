"""Does tenfold's server serve more users than llama.cpp's, and what does HTTP cost?

    python benchmarks/serve.py --llama-server FILE [--only users8 ...] [--layers 16] [--rounds 3] [--json]

The OLMoE-1B-7B shape with random weights, the same on both sides (q4 and Q4_0), and two servers that run
side by side and are asked in turn, by locust (serve_load.py): each user sends a prompt of 64 random tokens,
reads 64 tokens as they come, and asks again. llama-server is built from llama-cpp-python's source package:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    cmake --build build --target llama-server

`http` asks the offline engine for the same texts without a server. `first_token` sends a short prompt while
one of 4,000 tokens is processed.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from olmoe_gguf import write_olmoe
from random_pack import write_random_pack
from rows import Row, preset, print_rows, row
from vocabulary import write_tokenizer

from tenfold import compiled
from tenfold.bench.speed import random_ids
from tenfold.bench.subject import cut
from tenfold.formats import Packing
from tenfold.sampling import SamplingParams

PROMPT, TOKENS, LONG = 64, 64, 4000
USERS = 16
WARMUP = 10


class Server:
    """A process that answers at `url` once /health does."""

    def __init__(self, command: list[str], port: int, stack: ExitStack):
        self.url = f"http://127.0.0.1:{port}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = stack.enter_context(subprocess.Popen(command, **quiet))  # type: ignore[call-overload]
        stack.callback(self.process.terminate)
        while not self._ready():
            if self.process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {self.process.returncode}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def first_token(self, ids: list[int]) -> float:
        """Seconds from asking to the first token of a completion."""
        body = {"prompt": ids, "max_tokens": 2, "stream": True, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        asked = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    break
            took = time.perf_counter() - asked
            answer.read()
        return took


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.config = cut(preset("olmoe-1b-7b"), arguments.layers)
        self.rounds: int = arguments.rounds
        self.seconds: int = arguments.seconds
        self.folder: Path = arguments.folder
        self.threads = compiled.default_threads()
        self._llama: Path = arguments.llama_server
        self._stack, self._servers = ExitStack(), dict[str, Server]()
        self.folder.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self._servers.clear()
        self._stack.close()

    def pack(self) -> Path:
        out = self.folder / f"olmoe-{self.config.num_hidden_layers}-served"
        if not (out / "tokenizer.json").exists():
            write_random_pack(out, self.config, Packing(experts="q4", rest="q4"))
            write_tokenizer(out, self.config.vocab_size)
        return out

    def server(self, name: str) -> Server:
        """Either side's, started when it is first asked for."""
        if name not in self._servers:
            port = free_port()
            command = self._ours(port) if name == "tenfold" else self._theirs(port)
            self._servers[name] = Server(command, port, self._stack)
        return self._servers[name]

    def _ours(self, port: int) -> list[str]:
        return serve_command(self.pack(), port, "--max-sequences", str(USERS))

    def _theirs(self, port: int) -> list[str]:
        file = self.folder / f"olmoe-{self.config.num_hidden_layers}-Q4_0-served.gguf"
        if not file.exists():
            write_olmoe(file, self.config, "Q4_0", vocabulary=True)
        slots = ["-np", str(USERS), "-c", str(USERS * 2 * (PROMPT + TOKENS))]
        return [str(self._llama), "-m", str(file), "--port", str(port), "-t", str(self.threads), *slots]

    def load(self, url: str, users: int, seed: int) -> dict[str, Any]:
        """What locust saw of some users."""
        settings = {
            "prompt": PROMPT,
            "tokens": TOKENS,
            "vocab_size": self.config.vocab_size,
            "warmup": WARMUP,
            "seed": seed,
        }
        script = str(Path(__file__).with_name("serve_load.py"))
        shape = ["--users", str(users), "--spawn-rate", "100", "--run-time", f"{WARMUP + self.seconds}s"]
        ran = subprocess.run(
            [sys.executable, "-m", "locust", "-f", script, "--headless", "--host", url, *shape],
            env=os.environ | {"TENFOLD_LOAD": json.dumps(settings)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
        if found["failures"]:
            raise SystemExit(f"{url}: {found['failures']} requests failed")
        return found


def _users(bench: Bench, users: int, target: float) -> Iterator[Row]:
    names = ["tenfold", "llama"]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    firsts: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(bench.rounds):
        for name in names[:: -1 if turn % 2 else 1]:
            found = bench.load(bench.server(name).url, users, turn)
            speeds[name].append(found["tokens_per_second"])
            if found["first_token_seconds"] is not None:  # or nobody asked after the warm-up
                firsts[name].append(found["first_token_seconds"])
    ours, peer = (statistics.median(speeds[name]) for name in names)
    yield row(f"{users} users, tokens of all of them", ours, peer, target)
    if all(firsts.values()):
        ours, peer = (statistics.median(firsts[name]) for name in names)
        yield row(f"{users} users, time to first token", ours, peer, None, "s")


def users8(bench: Bench) -> Iterator[Row]:
    yield from _users(bench, 8, 1.5)


def users16(bench: Bench) -> Iterator[Row]:
    yield from _users(bench, 16, 2.2)


def http(bench: Bench) -> Iterator[Row]:
    """Against the offline engine, with as many sequences of the same lengths at once."""
    from tenfold.engine.llm import LLM

    bench.close()  # both engines would share the cores otherwise
    offline, served = [], []
    llm = LLM(bench.pack(), max_sequences=USERS)
    for turn in range(bench.rounds):
        params = SamplingParams(max_tokens=TOKENS, top_k=40, seed=turn, ignore_eos=True)
        prompts = random_ids(bench.config.vocab_size, 4 * USERS, PROMPT, turn).tolist()
        start = time.perf_counter()
        made = llm.generate(prompts, params)
        offline.append(sum(len(each.tokens) for each in made) / (time.perf_counter() - start))
        served.append(bench.load(bench.server("tenfold").url, USERS, turn)["tokens_per_second"])
    ours, peer = statistics.median(served), statistics.median(offline)
    yield row(f"{USERS} users through HTTP against the offline engine", ours, peer, 0.95)


def first_token(bench: Bench) -> Iterator[Row]:
    """Of a short prompt, alone and beside a long one, which is new each time."""
    server, alone, beside = bench.server("tenfold"), [], []
    for turn in range(2 * bench.rounds):
        short = random_ids(bench.config.vocab_size, 2, PROMPT, turn).tolist()
        alone.append(server.first_token(short[0]))
        (long,) = random_ids(bench.config.vocab_size, 1, LONG, turn).tolist()
        thread = threading.Thread(target=server.first_token, args=[long])
        thread.start()
        time.sleep(2 + turn % 3)
        beside.append(server.first_token(short[1]))
        thread.join()
    with_long, without = statistics.median(beside), statistics.median(alone)
    name = f"first token of {PROMPT} beside a prompt of {LONG:,}, against alone (at most)"
    yield row(name, with_long, without, 2.0, "s")


def serve_command(model: Path, port: int, *options: str) -> list[str]:
    main = [sys.executable, "-c", "from tenfold.cli import main; main()"]
    return [*main, "serve", str(model), "--port", str(port), *options]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (users8, users16, http, first_token)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--llama-server", type=Path, default=Path("llama-server"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=60, help="that count, of each load")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tenfold-gguf")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    try:
        print_rows({name: PARTS[name] for name in arguments.only}, bench, arguments.json)
    finally:
        bench.close()


if __name__ == "__main__":
    main()
