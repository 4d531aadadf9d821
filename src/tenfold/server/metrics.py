"""What Prometheus is told."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenfold.engine.request import AsyncEngine, Meter

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Of one server: a registry of its own, so that several in one process do not meet."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(engine))
        self.requests = Counter(
            "tenfold_requests", "Answered requests.", ["endpoint", "status"], registry=self._registry
        )
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, cached ones included.")
        self._cached = self._counter("cached_prompt_tokens", "Tokens of prompts that were in the KV cache.")
        self._generated = self._counter("generated_tokens", "Tokens that were generated.")
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token.", _FIRST)
        self._between = self._histogram("time_between_tokens_seconds", "From token to token.", _BETWEEN)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"tenfold_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"tenfold_{name}", text, buckets=buckets, registry=self._registry)

    def tokens(self, count: int, seconds: float, first: bool) -> None:
        """News of a text: `count` tokens, `seconds` after the news before."""
        self._generated.inc(count)
        (self._first if first else self._between).observe(seconds)

    def done(self, meters: Sequence[Meter], prompt_tokens: int) -> None:
        self._prompt.inc(prompt_tokens)
        self._cached.inc(sum(meter.cached_tokens for meter in meters))

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the engine counts itself, read when asked."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        load = self._engine.load()
        gauges = {
            "running_requests": ("Texts that are being generated.", load.running),
            "waiting_requests": ("Requests in the queue.", load.waiting),
            "kv_cache_usage": ("Share of the KV cache in use.", load.kv_blocks_used / max(load.kv_blocks, 1)),
            "memory_bytes": ("That the process holds.", load.memory_bytes),
            "batch_tokens": ("Tokens of a step, on average.", load.step_tokens / max(load.steps, 1)),
            "expert_hit_rate": (
                "Share of wanted experts that were in memory.",
                load.hits / max(load.hits + load.misses, 1),
            ),
        }
        counters = {
            "steps": ("Of the model.", load.steps),
            "step_tokens": ("Tokens of all steps.", load.step_tokens),
            "preemptions": ("Texts that had to make room for others.", load.preemptions),
            "expert_hits": ("Wanted experts that were in memory.", load.hits),
            "expert_misses": ("Wanted experts that were not.", load.misses),
            "disk_bytes": ("Read of experts.", load.disk_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"tenfold_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"tenfold_{name}", text, value=value)


class CountRequests:
    """ASGI middleware: one count for each answer, by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self._counter = app, metrics.requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counter.labels(endpoint_of(scope), str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


def endpoint_of(scope: Scope) -> str:
    """The route's pattern, not the path: clients make up as many paths as they like."""
    path = scope["path"]
    return path if path in scope["app"].openapi()["paths"] else getattr(scope.get("route"), "path", "other")
