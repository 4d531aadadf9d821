"""What went wrong, with the status and the body that OpenAI's clients expect."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tenfold.engine.request import Overloaded, Stopped, TooLong
from tenfold.errors import TenfoldError

logger = logging.getLogger("tenfold.server")

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
LONGEST_MESSAGE = 1000


class ApiError(HTTPException):
    """`param` is the field at fault, `code` a name for the fault that programs may rely on."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message[:LONGEST_MESSAGE], headers)
        self.param, self.code = param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def api_error(error: BaseException) -> ApiError:
    """Any error as one that a client may see; what nobody foresaw goes to the log."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid(error)
        case Overloaded():
            return ApiError(429, str(error), code="queue_full", retry_after=1)
        case Stopped():
            return ApiError(503, str(error), code="engine_failed")
        case TooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case TenfoldError():
            return ApiError(400, str(error))
        case TimeoutError():
            return ApiError(504, "the request took longer than this server allows", code="timeout")
        case HTTPException():
            found = ApiError(error.status_code, str(error.detail))
            found.headers = error.headers
            return found
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """Where a field may be one of several kinds, what each of them would have to be."""
    problems = error.errors()
    first = problems[0]
    if first["loc"] == ("body",) and first["type"] == "model_attributes_type":
        return ApiError(400, "send a JSON object, and Content-Type: application/json with it")
    field = _field(first["loc"])
    faults = [p["msg"].removeprefix("Value error, ") for p in problems if _field(p["loc"]) == field]
    message = "; or: ".join(dict.fromkeys(faults[:4]))
    given = first.get("input")
    if isinstance(given, str | int | float | None) and first["type"] != "missing":
        message += f", not {given!r:.100}"
    return ApiError(400, f"{field}: {message}" if field else message, param=field or None)


_KIND = re.compile(r"body|str|int|bool|float|constrained-.*|literal.*|.*\[.*|[A-Z]\w*")
"""What pydantic puts among the names of fields: the kinds that a value was tried as."""


def _field(where: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in where if not _KIND.fullmatch(str(part)))


def add_handlers(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in (RequestValidationError, TenfoldError, TimeoutError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
