"""The users of benchmarks/serve.py, for locust: each asks again as soon as it is answered.

    locust -f benchmarks/serve_load.py --headless --users 8 --spawn-rate 100 --run-time 60s --host URL

TENFOLD_LOAD names, as JSON, the tokens of prompt and answer, the vocabulary's size, and seconds that do not
count. Writes one line of JSON: tokens a second, and the median seconds to a first token.
"""

import json
import os
import random
import statistics
import time
from typing import Any

from locust import HttpUser, events, task

LOAD: dict[str, Any] = json.loads(os.environ["TENFOLD_LOAD"])
start = time.perf_counter() + LOAD["warmup"]
answered: list[float] = []  # when each token came
first: list[float] = []
dice = random.Random(LOAD["seed"])


class Caller(HttpUser):  # type: ignore[misc]
    @task  # type: ignore[untyped-decorator]
    def complete(self) -> None:
        ids = [dice.randrange(256, LOAD["vocab_size"] - 1) for _ in range(LOAD["prompt"])]
        # Drawn at random, or a random model would soon repeat itself, and its experts with it.
        choice = {"temperature": 1.0, "top_k": 40, "seed": dice.randrange(1 << 30)}
        body = {"prompt": ids, "max_tokens": LOAD["tokens"], "stream": True, "ignore_eos": True, **choice}
        asked, seen = time.perf_counter(), 0
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
            for line in response.iter_lines(chunk_size=None):
                if not line.startswith(b"data: {") or not json.loads(line[6:]).get("choices"):
                    continue
                now, seen = time.perf_counter(), seen + 1
                answered.append(now)
                if seen == 1 and asked > start:
                    first.append(now - asked)
            if seen < LOAD["tokens"] // 2:
                response.failure(f"{seen} pieces of an answer of {LOAD['tokens']}")


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def report(environment: Any, **_: Any) -> None:
    counted = [at for at in answered if at > start]
    print(
        json.dumps(
            {
                "tokens_per_second": len(counted) / (counted[-1] - start) if counted else 0.0,
                "first_token_seconds": statistics.median(first) if first else None,
                "failures": environment.stats.total.num_failures,
            }
        )
    )
