"""What is answered, for the OpenAPI description."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Answer):
    error: ErrorDetail


class PromptDetails(Answer):
    cached_tokens: int


class Sparsity(Answer):
    """What a request took of the model and of the machine; with prices also `cost` and its parts."""

    active_parameters: int
    total_parameters: int
    weight_bytes_used: int
    weight_bytes_read: int
    distinct_experts: int
    expert_hit_rate: float | None
    compute_seconds: float
    wait_seconds: float
    queue_seconds: float
    first_token_seconds: float | None
    energy_wh: float | None = None
    cost: float | None = None
    cost_input: float | None = None
    cost_output: float | None = None
    cost_per_million_input: float | None = None
    cost_per_million_output: float | None = None


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    tenfold: Sparsity


class FunctionCall(Answer):
    name: str
    arguments: str


class Call(Answer):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    tool_calls: list[Call] | None = None


class ChatChoice(Answer):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Health(Answer):
    status: Literal["ok", "draining", "failed"]


_FAULTS = {
    400: "The request is wrong: the message says what, and `param` where.",
    401: "No API key, or a wrong one.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "The request is too large.",
    429: "Too many requests are waiting.",
    503: "The server is stopping.",
    504: "It took longer than this server allows.",
}


def documented(model: type[BaseModel], streamed: bool = False) -> dict[str, Any]:
    """Arguments of a route: its answer and its faults."""
    answer: dict[str, Any] = {"model": model, "description": "The answer."}
    if streamed:
        answer["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    faults: dict[int, Any] = {
        status: {"model": ErrorBody, "description": text} for status, text in _FAULTS.items()
    }
    return {"response_model": None, "responses": {200: answer, **faults}}
