"""What all routes share, and how a request becomes answers of the engine, bounded in time and cancelled with
the client."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, time
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.types import Receive

from tenfold.engine.request import Answer, AsyncEngine, Meter, Piece, Request
from tenfold.server.asking import Workers
from tenfold.server.cost import Prices
from tenfold.server.errors import ApiError
from tenfold.server.metrics import Metrics
from tenfold.server.settings import ServeSettings
from tenfold.server.tokens import TokenTexts
from tenfold.server.tools import Dialect
from tenfold.server.usage import usage

Result = TypeVar("Result")

CLOSED = 499
"""Status of a request whose client left: nobody sees it but the metrics."""


@dataclass
class Serving:
    """One engine and what is known about it, for all requests."""

    engine: AsyncEngine
    settings: ServeSettings
    texts: TokenTexts
    workers: Workers
    metrics: Metrics
    prices: Prices
    dialect: Dialect | None
    """None where there is no chat template."""
    draining: bool = False
    started: int = field(default_factory=lambda: int(time()))

    @property
    def name(self) -> str:
        return self.settings.model_name or self.engine.facts.name

    def check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(
                404, f"no model {name!r:.100} is here, only {self.name}", "model", code="model_not_found"
            )

    def deadline(self) -> float:
        """Of a request that arrives now, by the event loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.request_timeout

    async def submit(self, requests: Sequence[Request]) -> "Answers":
        """All of them, or none. Raises what the engine raises."""
        if requests[0].constraint is None:
            answers, error = self._submit(requests)
        else:  # compiling it may take seconds
            work = asyncio.create_task(self.workers.run(partial(self._submit, requests)))
            try:
                answers, error = await asyncio.shield(work)
            except asyncio.CancelledError as cancelled:
                answers, error = (await work)[0], cancelled
        if error is not None:
            await asyncio.gather(*(answer.aclose() for answer in answers))
            raise error
        return Answers(answers, requests, self)

    def _submit(self, requests: Sequence[Request]) -> tuple[list[Answer], BaseException | None]:
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.engine.submit(request))  # noqa: PERF401 (those before one that fails)
        except Exception as error:
            return answers, error
        return answers, None


class Answers:
    """Those of the prompts of one HTTP request. Choice i * n + j is text j of prompt i."""

    def __init__(self, answers: Sequence[Answer], requests: Sequence[Request], serving: Serving) -> None:
        self._answers, self._n, self._serving = answers, requests[0].n, serving
        self.prompts = [request.prompt_ids for request in requests]
        self.choices = len(requests) * self._n
        self.completion_tokens = 0
        self._begun = monotonic()
        self._last = [self._begun] * self.choices

    @property
    def meters(self) -> list[Meter]:
        return [answer.meter for answer in self._answers]

    def usage(self, completion_tokens: int | None = None) -> dict[str, Any]:
        """So far. `completion_tokens` is what the client was given of them, by default all."""
        made = self.completion_tokens if completion_tokens is None else completion_tokens
        prompt_tokens = sum(map(len, self.prompts))
        facts, prices = self._serving.engine.facts, self._serving.prices
        return usage(self.meters, prompt_tokens, made, facts, prices)

    async def __aiter__(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Choice and piece, as they come."""
        if len(self._answers) == 1:
            async for piece in self._answers[0]:
                yield piece.index, self._count(piece.index, piece)
            return
        news: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()
        pumps = [asyncio.create_task(self._pump(number, news)) for number in range(len(self._answers))]
        try:
            for _ in pumps:
                while (found := await news.get()) is not None:
                    if isinstance(found, BaseException):
                        raise found
                    yield found[0], self._count(*found)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _pump(
        self, number: int, news: "asyncio.Queue[tuple[int, Piece] | BaseException | None]"
    ) -> None:
        try:
            async for piece in self._answers[number]:
                news.put_nowait((number * self._n + piece.index, piece))
            news.put_nowait(None)
        except Exception as error:
            news.put_nowait(error)

    def _count(self, choice: int, piece: Piece) -> Piece:
        self.completion_tokens += len(piece.tokens)
        if piece.tokens:
            now = monotonic()
            first = self._last[choice] == self._begun
            self._serving.metrics.tokens(len(piece.tokens), now - self._last[choice], first)
            self._last[choice] = now
        return piece

    async def close(self) -> None:
        """Cancels what is not done."""
        self._serving.metrics.done(self.meters, sum(map(len, self.prompts)))
        await asyncio.gather(*(answer.aclose() for answer in self._answers), return_exceptions=True)


def reason(piece: Piece) -> str | None:
    """Why a text ended. Raises ApiError for one that the engine was not let finish."""
    if piece.finish_reason == "cancelled":
        raise ApiError(503, "the server is stopping", code="draining", retry_after=10)
    return piece.finish_reason


async def collected(
    request: HttpRequest, work: Awaitable[Result], answers: Answers, deadline: float
) -> Result:
    """The work's result; the answers are cancelled when the client leaves or time is up."""
    try:
        async with asyncio.timeout_at(deadline):
            return await while_connected(request, work)
    finally:
        await answers.close()


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """The work's result. Where the client leaves before, the work is cancelled and ApiError raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLOSED, "the client closed the connection")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
