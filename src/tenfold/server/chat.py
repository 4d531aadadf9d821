"""/v1/chat/completions"""

import asyncio
import secrets
import string
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from functools import partial
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from pydantic_core import from_json
from starlette.responses import Response

from tenfold.engine.request import Constraint, Piece, Request
from tenfold.server.asking import asked_constraint, checked_ids, sampling_params
from tenfold.server.errors import ApiError
from tenfold.server.limits import JsonRoute
from tenfold.server.reply import Part, Reader
from tenfold.server.responses import ChatCompletion, documented
from tenfold.server.schemas import ChatRequest, Message, NamedTool
from tenfold.server.serving import Answers, Serving, collected, reason
from tenfold.server.streaming import EventStream
from tenfold.server.tokens import TokenTexts, chat_logprobs, told_tokens
from tenfold.server.tools import Dialect, Schemas, schemas_of

router = APIRouter(route_class=JsonRoute)
_RESERVED = {"self", "messages", "tools", "documents", "tokenize", "add_generation_prompt"}


@dataclass(frozen=True)
class Asked:
    """A chat as the engine is asked, and what it takes to read its answers."""

    request: Request
    dialect: Dialect
    prompt: str
    """As the template rendered it."""
    opening: str
    """What the answer is made to begin with."""
    schemas: Schemas

    def reader(self) -> Reader:
        reader = self.dialect.reader(self.prompt, self.schemas)
        reader.feed(self.opening)
        return reader


@router.post("/v1/chat/completions", **documented(ChatCompletion, streamed=True))
async def chat_completions(request: HttpRequest, body: ChatRequest) -> Response:
    """The next message of a conversation."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    deadline = serving.deadline()
    async with asyncio.timeout_at(deadline):
        asked = await serving.workers.run(partial(prepare, serving, body))
        answers = await serving.submit([asked.request])
    reply = Reply(serving, body, asked, answers)
    if body.stream:
        return EventStream(reply.events(), answers, deadline)
    return JSONResponse(await collected(request, reply.whole(), answers, deadline))


def prepare(serving: Serving, body: ChatRequest) -> Asked:
    """The slow part: renders the template, and tokenises."""
    tokenizer, facts = serving.engine.tokenizer, serving.engine.facts
    if tokenizer.chat_template is None or serving.dialect is None:
        raise ApiError(400, f"{serving.name} has no chat template: use /v1/completions", param="messages")
    dialect = serving.dialect
    tools = body.tools if body.tool_choice != "none" else None
    if tools and not dialect.knows_tools:
        raise ApiError(400, f"the chat template of {serving.name} knows no tools", param="tools")
    prompt = tokenizer.apply_chat_template(
        [_message(message, dialect) for message in body.messages],
        [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
        add_generation_prompt=True,
        tokenize=False,
        **_variables(body),
    )
    schemas = schemas_of(tools or [])
    opening, constraint = _led(body, dialect, prompt, schemas)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = sampling_params(body, facts.context if limit is None else limit, facts)
    request = Request(
        prompt_ids=checked_ids(tokenizer, prompt + opening, facts, add_special_tokens=False),
        params=params,
        n=body.choices,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=constraint,
        routes=bool(body.return_experts),
    )
    return Asked(request, dialect, prompt, opening, schemas)


def _variables(body: ChatRequest) -> dict[str, Any]:
    given = dict(body.chat_template_kwargs or {})
    if taken := _RESERVED & given.keys():
        raise ApiError(400, f"{min(taken)} is not for clients to set", param="chat_template_kwargs")
    return given if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort, **given}


def _message(message: Message, dialect: Dialect) -> dict[str, Any]:
    """As templates expect it: content is text, arguments of calls are objects."""
    plain = message.model_dump(exclude_none=True)
    if message.role == "developer" and not dialect.knows_developers:
        plain["role"] = "system"
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    plain.setdefault("content", "")
    if not dialect.arguments_as_text:
        for call in plain.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = from_json(call["function"]["arguments"] or "{}")
            except ValueError as error:
                raise ApiError(400, f"arguments of a tool call are not JSON: {error}", "messages") from None
    return plain


def _led(body: ChatRequest, dialect: Dialect, prompt: str, schemas: Schemas) -> tuple[str, Constraint | None]:
    """What the answer begins with, and the constraint on the rest."""
    constraint, choice = asked_constraint(body), body.tool_choice
    if choice == "required" or isinstance(choice, NamedTool):
        if constraint:
            raise ApiError(400, "a required tool call leaves no room for another format", "tool_choice")
        if isinstance(choice, NamedTool):
            schemas = {choice.function.name: schemas[choice.function.name]}
        return dialect.forced(prompt, schemas)
    return dialect.before_content(prompt) if constraint else "", constraint


class Choice:
    """One of the answers while it comes, as deltas of its message."""

    def __init__(self, index: int, reader: Reader, texts: TokenTexts, body: ChatRequest) -> None:
        self._index, self._reader, self._texts, self._body = index, reader, texts, body
        self._text_of, self._calls = texts.reader(), 0

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Of a stream: the choice, and under `tenfold` the tokens if they are asked for."""
        parts = self._reader.feed(piece.text) if piece.text else []
        if piece.finish_reason:
            parts += self._reader.finish()
        deltas = [self._delta(part) for part in parts] or [{}]
        choices: list[dict[str, Any]] = [
            {"index": self._index, "delta": d, "logprobs": None, "finish_reason": None} for d in deltas
        ]
        choices[0]["logprobs"] = self._logprobs(piece)
        choices[-1]["finish_reason"] = self._finish(piece)
        chunks = [{"choices": [choice]} for choice in choices]
        if self._body.return_experts and piece.tokens:
            chunks[0] |= told_tokens(piece.tokens, self._text_of)
        return chunks if parts or piece.finish_reason or len(chunks[0]) > 1 or choices[0]["logprobs"] else []

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.kind != "call":
            return {"content" if part.kind == "content" else "reasoning_content": part.text}
        self._calls += 1
        function = {"name": part.name, "arguments": part.text}
        call = {"index": self._calls - 1, "id": _call_id(), "type": "function", "function": function}
        return {"tool_calls": [call]}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._body.logprobs or not piece.tokens:
            return None
        return {"content": chat_logprobs(piece.tokens, self._texts), "refusal": None}

    def _finish(self, piece: Piece) -> str | None:
        found = reason(piece)
        return "tool_calls" if found == "stop" and self._calls else found


class Reply:
    """The answer to one request: `events` as they come, or `whole`."""

    def __init__(self, serving: Serving, body: ChatRequest, asked: Asked, answers: Answers) -> None:
        self._body, self._answers = body, answers
        self._choices = [Choice(i, asked.reader(), serving.texts, body) for i in range(answers.choices)]
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time()), "model": serving.name}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        head = {**self._head, "object": "chat.completion.chunk"}
        if self._body.include_usage:
            head["usage"] = None
        for index in range(len(self._choices)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield {**head, "choices": [choice]}
        async for index, piece in self._answers:
            for chunk in self._choices[index].chunks(piece):
                yield head | chunk
        if self._body.include_usage:
            yield {**head, "choices": [], "usage": self._answers.usage()}

    async def whole(self) -> dict[str, Any]:
        found = [_Gathered() for _ in self._choices]
        async for index, piece in self._answers:
            for chunk in self._choices[index].chunks(piece):
                found[index].add(chunk)
        choices = [one.choice(index) for index, one in enumerate(found)]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._answers.usage(),
            **({"tenfold": {"tokens": [one.tokens for one in found]}} if self._body.return_experts else {}),
        }


@dataclass
class _Gathered:
    """The deltas of one answer, put together."""

    text: dict[str, list[str]] = field(default_factory=lambda: {"content": [], "reasoning_content": []})
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    def add(self, chunk: dict[str, Any]) -> None:
        choice = chunk["choices"][0]
        for name, texts in self.text.items():
            texts.append(choice["delta"].get(name, ""))
        self.calls += choice["delta"].get("tool_calls", [])
        self.logprobs += (choice["logprobs"] or {}).get("content", [])
        self.tokens += chunk.get("tenfold", {}).get("tokens", [])
        self.finish = choice["finish_reason"] or self.finish

    def choice(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant"}
        message |= {name: "".join(texts) or None for name, texts in self.text.items()}
        if message["content"] is None and not self.calls:
            message["content"] = ""
        if self.calls:
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in self.calls]
        logprobs = {"content": self.logprobs, "refusal": None} if self.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}


def _call_id() -> str:
    """Nine letters or digits: Mistral's templates refuse all others."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
