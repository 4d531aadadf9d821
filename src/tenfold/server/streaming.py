"""Answers as server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tenfold.server.errors import api_error
from tenfold.server.serving import Answers, disconnected

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

_LAST_SECONDS = 5


def event(content: Any) -> bytes:
    return b"data: %s\n\n" % json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


class EventStream(Response):
    """The events, and `[DONE]`; an error instead, if it comes to that.

    What is left of the answers is cancelled when the client leaves or the `deadline` is over.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Any], answers: Answers, deadline: float) -> None:
        self.status_code, self.background = 200, None
        self.init_headers(_HEADERS)
        self._events, self._answers, self._deadline = events, answers, deadline

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        leaving = asyncio.create_task(disconnected(receive))
        writing = asyncio.create_task(self._write(send))
        try:
            await asyncio.wait((leaving, writing), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for task in (leaving, writing):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
            await self._answers.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        last = b"data: [DONE]\n\n"
        try:
            async with asyncio.timeout_at(self._deadline):
                async for content in self._events:
                    await send({"type": "http.response.body", "body": event(content), "more_body": True})
        except Exception as error:
            last = event(api_error(error).body)
        with suppress(TimeoutError):  # of a client that does not read: the server then closes the connection
            async with asyncio.timeout(_LAST_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})
