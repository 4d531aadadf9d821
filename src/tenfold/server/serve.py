"""Starting and stopping: a socket, uvicorn, signals."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from tenfold.engine.async_engine import AsyncLLM
from tenfold.engine.loading import USUAL_CONTEXT, open_batch_runner
from tenfold.engine.request import AsyncEngine
from tenfold.errors import TenfoldError
from tenfold.memory import Budget
from tenfold.server.app import make_app
from tenfold.server.settings import ServeSettings

_FLUSH_SECONDS = 5
"""For the last bytes to reach their clients, once the engine is done."""


def open_engine(path_or_id: str | Path, memory: Budget, settings: ServeSettings) -> AsyncLLM:
    """With the model of a directory, a .gguf file or a hub id. Raises what `open_batch_runner` does."""
    context, sequences = settings.context or USUAL_CONTEXT, settings.max_sequences
    opened = open_batch_runner(path_or_id, memory, context, sequences, settings.kv_tokens)
    runner, tokenizer, path, memory_bytes = opened
    name = settings.model_name or path.name
    return AsyncLLM(runner, tokenizer, name, context, sequences, settings.max_queue, memory_bytes)


def serve(make_engine: Callable[[], AsyncEngine], settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests then have `settings.grace` seconds to end.

    A second signal ends the process at once. Raises TenfoldError where the address cannot be had, which is
    found out before the model is loaded.
    """
    with closing(_bound(settings.host, settings.port)) as listener:
        engine = make_engine()
        asyncio.run(_serve(make_app(engine, settings), engine, settings, listener))


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise TenfoldError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None
    return listener


async def _serve(app: FastAPI, engine: AsyncEngine, settings: ServeSettings, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=_FLUSH_SECONDS
    )
    server = _Server(config, partial(print, _greeting(app, listener), flush=True))
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    with _signals(lambda: loop.call_soon_threadsafe(stop.set)):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        app.state.serving.draining = True
        await engine.close(settings.grace)
        server.should_exit = True
        await serving


def _greeting(app: FastAPI, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"{app.state.serving.name}: {where} (API at {where}/v1, described at {where}/docs)"


@contextmanager
def _signals(stop: Callable[[], object]) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask to stop; the next one does what it does without us."""
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def hear(*_: object) -> None:
        for kind in kinds:
            signal.signal(kind, signal.SIG_DFL)
        stop()

    for kind in kinds:
        signal.signal(kind, hear)
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


class _Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us and says when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._say = started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say()
