"""From what a client asks to what an engine is asked."""

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from pydantic import ValidationError

from tenfold.engine.generation import encode_prompt
from tenfold.engine.request import Constraint, ModelFacts, TooLong
from tenfold.parsed import first_problem
from tenfold.sampling import SamplingParams
from tenfold.server.errors import ApiError
from tenfold.server.schemas import ChatRequest, ResponseFormat, Sampling
from tenfold.tokenizer import Tokenizer

Result = TypeVar("Result")

_TAKEN_OVER = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop_token_ids",
)


def sampling_params(body: Sampling, max_tokens: int, facts: ModelFacts) -> SamplingParams:
    """What is None is the default's, as OpenAI has it. Raises ApiError for what this model cannot do."""
    if max_tokens > facts.context:
        raise ApiError(
            400,
            f"max_tokens {max_tokens} is more than the context holds, {facts.context} tokens",
            "max_tokens",
        )
    for name, ids in (("logit_bias", body.logit_bias or {}), ("stop_token_ids", body.stop_token_ids or [])):
        if wrong := [token for token in ids if not _is_token(token, facts.vocab_size)]:
            raise ApiError(400, f"{wrong[0]!r:.40} is no token id below {facts.vocab_size}", name)
    given = {name: value for name in _TAKEN_OVER if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        given["seed"] = body.seed % 2**63
    if body.top_k is not None and body.top_k > 0:
        given["top_k"] = body.top_k
    if body.stop is not None:
        given["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    try:
        return SamplingParams(max_tokens=max(max_tokens, 1), ignore_eos=bool(body.ignore_eos), **given)
    except ValidationError as error:
        raise ApiError(400, first_problem(error)) from None


def _is_token(token: str | int, vocab_size: int) -> bool:
    text = str(token)
    return text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < vocab_size


def asked_constraint(body: Sampling) -> Constraint | None:
    """Raises ApiError where two are asked for."""
    form = body.response_format if isinstance(body, ChatRequest) else None
    found = {
        "guided_json": _json_schema(body.guided_json),
        "guided_regex": body.guided_regex and Constraint("regex", body.guided_regex),
        "guided_grammar": body.guided_grammar and Constraint("grammar", body.guided_grammar),
        "response_format": _of_format(form),
    }
    given = {name: constraint for name, constraint in found.items() if constraint}
    if len(given) > 1:
        first, second = given
        raise ApiError(400, f"{first} and {second} exclude each other", param=second)
    return next(iter(given.values()), None)


def _of_format(form: ResponseFormat | None) -> Constraint | None:
    if form is None or form.type == "text":
        return None
    return _json_schema(form.json_schema.definition if form.json_schema else {"type": "object"})


def _json_schema(schema: dict[str, Any] | str | None) -> Constraint | None:
    if schema is None:
        return None
    return Constraint("json_schema", schema if isinstance(schema, str) else schema_text(schema))


def schema_text(schema: Mapping[str, Any]) -> str:
    """A schema for llguidance. Small models would go on with white space for ever: it is enough to indent."""
    guidance = {"whitespace_pattern": "[ \\n]{0,20}"}
    try:
        return json.dumps({"x-guidance": guidance, **schema}, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ApiError(400, f"a number is not finite: {error}") from None


def checked_ids(tokenizer: Tokenizer, text: str, facts: ModelFacts, add_special_tokens: bool) -> list[int]:
    """Token ids of a prompt. What could not fit however it is split is not even tried."""
    most = facts.context * longest_token(tokenizer)
    if len(text) > most:
        raise TooLong(
            f"the prompt has {len(text)} characters; the context, {facts.context} tokens, {most} at most"
        )
    if not add_special_tokens:
        return tokenizer.encode(text, add_special_tokens=False)
    return encode_prompt(tokenizer, text)


@lru_cache(maxsize=4)
def longest_token(tokenizer: Tokenizer) -> int:
    """In characters."""
    return max(map(len, tokenizer.raw.get_vocab()))


class Workers:
    """Threads for what would keep the event loop: templates, tokenisers, grammars."""

    def __init__(self) -> None:
        self._limiter = CapacityLimiter(4)

    async def run(self, work: Callable[[], Result]) -> Result:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
