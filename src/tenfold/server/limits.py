"""What is checked before a request is read: who asks, how many do, how large it is and how slowly it comes.

A body is read whole before the application sees the request, so nothing in it can be slow or too large later.
"""

import asyncio
import gc
import hmac
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenfold.server.errors import ApiError
from tenfold.server.settings import ServeSettings

BODY_SECONDS = 30
"""For a body to arrive in."""


class Gate:
    """ASGI middleware in front of everything below /v1. `draining` closes it."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self._keys = app, [key.encode() for key in settings.keys]
        self._most = settings.max_queue + settings.max_sequences
        self._max_bytes = settings.max_body_bytes
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            if scope["method"] != "POST":
                return await self.app(scope, receive, send)
            self._check_room(scope)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        self._inside += 1
        try:
            await self._with_body(scope, receive, send)
        finally:
            self._inside -= 1

    def _check_key(self, scope: Scope) -> None:
        if not self._keys:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not any(hmac.compare_digest(key.strip(), k) for k in self._keys):
            raise ApiError(
                401,
                "give one of this server's API keys as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    def _check_room(self, scope: Scope) -> None:
        if scope["app"].state.serving.draining:
            raise ApiError(503, "the server is stopping", code="draining", retry_after=10)
        if self._inside >= self._most:
            raise ApiError(429, "too many requests are waiting", code="queue_full", retry_after=1)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read(scope, receive, self._max_bytes)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)


async def _read(scope: Scope, receive: Receive, most: int) -> bytes | None:
    """The body; None where the client left before its end. Raises ApiError 413 or 408."""
    too_large = ApiError(413, f"the request is larger than {most} bytes", code="request_too_large")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None


class JsonRoute(APIRoute):
    """A route whose body is read by a parser that cannot be made to recurse, or to take what is not JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        gc.disable()  # it would look at a million new lists again and again, for seconds
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        finally:
            gc.enable()
