"""What clients may ask: the requests of OpenAI's API, and what vLLM's clients add to them.

Unknown fields are ignored, as clients send more than any server knows. Everything else has a bound.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

MAX_CHOICES = 128
"""Texts that one request may ask for, of all its prompts together."""
MAX_TOP = 20
"""Alternatives beside a token."""
MAX_TOLD = 512
"""Alternatives of all texts of a request together: 128 texts with 20 each took 145 MB, and the event loop 2 s
a hundred tokens."""
MAX_ID = 2**31 - 1


class OneError(FailFast):
    """A hostile list has a million errors: the first is enough. Python 3.11 hashes what is in unions."""

    __hash__ = object.__hash__


def few(most: int) -> BeforeValidator:
    """The same for an object: not even looked into where it has too many fields."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"{len(value)} entries are too many, {most} are allowed")
        return value

    return BeforeValidator(check)


Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_ID)]], OneError(), Field(max_length=1 << 20)]
Texts = Annotated[list[str], OneError(), Field(max_length=MAX_CHOICES)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], OneError(), Field(max_length=64)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Grammar = Annotated[str, Field(min_length=1, max_length=1 << 16)]


class Schema(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Schema):
    include_usage: bool | None = None


class Sampling(Schema):
    """What chats and completions have in common."""

    model: str | None = Field(None, max_length=1000, description="the one that is here")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_ID, description="-1 and 0 are no limit")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Bias] | None, few(1024)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Stops | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_ID)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guided_json: dict[str, Any] | Grammar | None = None
    guided_regex: Grammar | None = None
    guided_grammar: Grammar | None = Field(None, description="in Lark's notation")
    return_experts: bool | None = Field(None, description="tell with each token which experts made it")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        given = [name for name in ("guided_json", "guided_regex", "guided_grammar") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other")
        return self


class JsonSchema(Schema):
    name: str = Field("", max_length=64)
    definition: dict[str, Any] = Field(alias="schema", default_factory=dict)


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class Function(Schema):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Schema):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Schema):
    name: Name


class NamedTool(Schema):
    type: Literal["function"] = "function"
    function: NamedFunction


class CalledFunction(Schema):
    name: Name
    arguments: str


class ToolCall(Schema):
    id: str = Field("", max_length=1000)
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(Schema):
    type: Literal["text"]
    text: str


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], OneError(), Field(max_length=1024)] | None = None
    name: str | None = Field(None, max_length=1000)
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], OneError(), Field(max_length=128)] | None = None
    tool_call_id: str | None = Field(None, max_length=1000)


class ChatRequest(Sampling):
    messages: Annotated[list[Message], OneError(), Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_ID)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], OneError(), Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    reasoning_effort: str | None = Field(None, max_length=20)
    chat_template_kwargs: Annotated[dict[Name, bool | int | float | str] | None, few(16)] = Field(
        None, description="what this model's chat template knows besides, such as enable_thinking"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.choices * (self.top_logprobs or 0) > MAX_TOLD:
            raise ValueError(f"n times top_logprobs may be {MAX_TOLD} at most")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have one name")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is not among tools")
        return self


class CompletionRequest(Sampling):
    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], OneError(), Field(max_length=MAX_CHOICES)]
    suffix: str | None = Field(None, max_length=0, description="not supported")
    best_of: int | None = Field(None, description="not supported, unless it is n")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each is text, or token ids."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return prompt if several else [prompt]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of other than n is not supported")
        if len(self.prompts) * self.choices > MAX_CHOICES:
            raise ValueError(f"prompts times n may be {MAX_CHOICES} at most")
        if len(self.prompts) * self.choices * (self.logprobs or 0) > MAX_TOLD:
            raise ValueError(f"prompts times n times logprobs may be {MAX_TOLD} at most")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs cannot be streamed")
        return self
