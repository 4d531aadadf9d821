"""/v1/completions"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from tenfold.engine.request import Logprob, Piece, Request
from tenfold.server.asking import asked_constraint, checked_ids, sampling_params
from tenfold.server.limits import JsonRoute
from tenfold.server.responses import Completion, documented
from tenfold.server.schemas import CompletionRequest
from tenfold.server.serving import Answers, Serving, collected, reason
from tenfold.server.streaming import EventStream
from tenfold.server.tokens import CompletionLogprobs, told_tokens

router = APIRouter(route_class=JsonRoute)
DEFAULT_TOKENS = 16
"""OpenAI's."""


@router.post("/v1/completions", **documented(Completion, streamed=True))
async def completions(request: HttpRequest, body: CompletionRequest) -> Response:
    """Texts that go on from prompts."""
    serving: Serving = request.app.state.serving
    serving.check_model(body.model)
    deadline = serving.deadline()
    async with asyncio.timeout_at(deadline):
        requests, prompts = await serving.workers.run(partial(prepare, serving, body))
        answers = await serving.submit(requests)
    reply = Reply(serving, body, prompts, answers)
    if body.stream:
        return EventStream(reply.events(), answers, deadline)
    return JSONResponse(await collected(request, reply.whole(), answers, deadline))


def prepare(serving: Serving, body: CompletionRequest) -> tuple[list[Request], list[str]]:
    """The slow part: tokenises. Also the prompts as text, if they are to be repeated."""
    tokenizer, facts = serving.engine.tokenizer, serving.engine.facts
    params = sampling_params(body, DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, facts)
    if body.echo and body.logprobs is not None and body.max_tokens == 1:
        # Who scores a prompt counts on one token after it (lm-eval does), also where the text would end.
        params = params.model_copy(update={"ignore_eos": True})
    constraint = asked_constraint(body)
    requests, texts = [], []
    for prompt in body.prompts:
        ids = checked_ids(tokenizer, prompt, facts, True) if isinstance(prompt, str) else prompt
        requests.append(
            Request(
                prompt_ids=ids,
                params=params,
                n=body.choices,
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
                constraint=constraint,
                routes=bool(body.return_experts),
            )
        )
        if body.echo:
            texts.append(prompt if isinstance(prompt, str) else tokenizer.decode(ids))
    return requests, texts


class Reply:
    """The answer to one request: `events` as they come, or `whole`.

    Where a client wants no new tokens (`max_tokens` 0), the one that the engine must make is left out.
    """

    def __init__(
        self, serving: Serving, body: CompletionRequest, prompts: Sequence[str], answers: Answers
    ) -> None:
        self._body, self._answers, self._prompts = body, answers, prompts
        self._texts = [serving.texts.reader() for _ in range(answers.choices)]
        self._logprobs = [CompletionLogprobs(serving.texts) for _ in range(answers.choices)]
        self._silent = body.max_tokens == 0
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time()),
            "model": serving.name,
        }

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        head = {**self._head, **({"usage": None} if self._body.include_usage else {})}
        echo = [self._echo(choice) for choice in range(self._answers.choices)]
        async for choice, piece in self._pieces():
            text, echo[choice] = echo[choice] + piece.text, ""
            if text or piece.tokens or piece.finish_reason:
                yield head | self._chunk(choice, replace(piece, text=text), [])
        if self._body.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        found = [Piece(choice, self._echo(choice), []) for choice in range(self._answers.choices)]
        async for choice, piece in self._pieces():
            one = found[choice]
            prompt = one.prompt if piece.prompt is None else piece.prompt
            tokens = [*one.tokens, *piece.tokens]
            found[choice] = Piece(choice, one.text + piece.text, tokens, piece.finish_reason, prompt)
        chunks = [self._chunk(i, piece, self._of_prompt(i, found)) for i, piece in enumerate(found)]
        return {
            **self._head,
            "choices": [choice for chunk in chunks for choice in chunk["choices"]],
            "usage": self._usage(),
        }

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        async for choice, piece in self._answers:
            yield choice, replace(piece, text="", tokens=[]) if self._silent else piece

    def _echo(self, choice: int) -> str:
        return self._prompts[choice // self._body.choices] if self._body.echo else ""

    def _of_prompt(self, choice: int, found: Sequence[Piece]) -> list[tuple[int, Logprob | None]]:
        """Text 0 of each prompt is told of the prompt's tokens."""
        number = choice // self._body.choices
        told = found[number * self._body.choices].prompt
        return [] if told is None else list(zip(self._answers.prompts[number], told, strict=True))

    def _chunk(self, index: int, piece: Piece, told: Sequence[tuple[int, Logprob | None]]) -> dict[str, Any]:
        finish = reason(piece)
        if self._silent:
            finish = finish and "length"
        told = [*told, *((token.id, token.logprob) for token in piece.tokens)]
        logprobs = self._logprobs[index](told) if self._body.logprobs is not None else None
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}
        chunk: dict[str, Any] = {"choices": [choice]}
        if self._body.return_experts and piece.tokens:
            chunk |= told_tokens(piece.tokens, self._texts[index])
        return chunk

    def _usage(self) -> dict[str, Any]:
        return self._answers.usage(0 if self._silent else None)
