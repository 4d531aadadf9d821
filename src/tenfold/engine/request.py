"""What is asked of an engine, and what it answers: for server, offline batches and scheduler alike."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]


class Overloaded(TenfoldError):
    """More is waiting than the queue holds: ask again later."""


class Stopped(TenfoldError):
    """The engine takes no more requests, or cannot go on with this one: its disk or its model failed."""


class TooLong(TenfoldError):
    """The prompt leaves no room in the context, or could never fit the KV cache."""


@dataclass(frozen=True)
class Constraint:
    """What the text must be."""

    kind: Literal["json_schema", "regex", "grammar"]
    """A JSON schema (as JSON text), a regular expression, or a Lark grammar."""
    text: str


@dataclass(frozen=True)
class Request:
    prompt_ids: Sequence[int]
    params: SamplingParams
    n: int = 1
    """Texts to make of the one prompt; text i draws with seed + i."""
    logprobs: int | None = None
    """Alternatives to tell beside each token's own log-probability; None is none of either."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    constraint: Constraint | None = None
    routes: bool = False
    """Whether to tell which experts made each token."""


class Logprob(NamedTuple):
    """Of the model's own distribution, before temperature, penalties and everything else."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    """The likeliest tokens, likeliest first."""


class Token(NamedTuple):
    """One that was generated."""

    id: int
    logprob: Logprob | None = None
    experts: Sequence[Sequence[int]] | None = None
    """What each sparse layer chose for the step that made it, -1 where a slot was empty."""


@dataclass
class Costs:
    """What some tokens of one request cost. What a step shares is split among its tokens, so that the costs
    of all requests add up to what was spent."""

    tokens: int = 0
    weight_bytes: float = 0
    """Of weights that were used: a batch's step reads each once, however many of its tokens share it."""
    disk_bytes: float = 0
    """Of those, what was read from disk."""
    hits: float = 0
    """Experts that were wanted and in memory; all of them, where the model is resident."""
    misses: float = 0
    seconds: float = 0
    """Of the model's steps, waiting for the disk included."""
    wait_seconds: float = 0


@dataclass
class Meter:
    """Of a whole request, all its n texts."""

    prompt: Costs = field(default_factory=Costs)
    decode: Costs = field(default_factory=Costs)
    cached_tokens: int = 0
    """Of the prompt: their keys and values were in the cache already."""
    distinct_experts: int = 0
    """Different (layer, expert) pairs that its tokens used."""
    queue_seconds: float = 0
    first_token_seconds: float | None = None
    """From submission to the first token."""
    drafted: int = 0
    """Tokens that speculation proposed, and those of them that were right."""
    accepted: int = 0


@dataclass
class Piece:
    """News of one text of a request."""

    index: int
    """Which of its n texts."""
    text: str
    """What is new of it: nothing later will change it, and no stop string take it back."""
    tokens: Sequence[Token]
    """New ones; their text may come in a later piece, or never, where a stop string takes it back."""
    finish_reason: FinishReason | None = None
    """With the last piece of a text."""
    prompt: Sequence[Logprob | None] | None = None
    """With the first piece of text 0, if the request asks for the prompt's: None of its first token."""


@dataclass(frozen=True)
class ModelFacts:
    """What does not change while an engine runs."""

    name: str
    context: int
    """Positions that one sequence may have."""
    vocab_size: int
    num_params: int
    num_active_params: int
    num_layers: int
    sparse_layers: Sequence[int]
    num_experts: int
    num_experts_per_tok: int
    memory_bytes: int | None
    """The budget it runs within; None where there is none."""


@dataclass(frozen=True)
class Load:
    """How busy an engine is; what counts up counts since it started."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    """Kept prefixes that nobody uses now are not counted."""
    memory_bytes: int
    """That the process holds."""
    steps: int
    step_tokens: int
    """Tokens of all steps: over `steps` it is the mean batch."""
    preemptions: int
    hits: int
    misses: int
    disk_bytes: int


class Answer(Protocol):
    """A request under way: iterate for its pieces. Closing it early (`aclose`) cancels what is left."""

    @property
    def meter(self) -> Meter: ...
    def __aiter__(self) -> AsyncGenerator[Piece, None]: ...
    async def aclose(self) -> None: ...


class AsyncEngine(Protocol):
    """One model that serves many requests at once, from one event loop."""

    facts: ModelFacts
    tokenizer: Tokenizer

    @property
    def stopped(self) -> str | None:
        """Why it takes no more requests; None while it does."""
        ...

    def submit(self, request: Request) -> Answer:
        """Queue a request; never blocks.

        Raises Overloaded where the queue is full, TooLong, and TenfoldError for anything else that cannot be
        done (ids that are no tokens, a constraint that cannot be compiled).
        """
        ...

    def load(self) -> Load: ...

    async def close(self, grace: float) -> None:
        """Take no more requests; those that run may go on for `grace` seconds, then they are cancelled."""
        ...


def describe(meter: Meter) -> dict[str, Any]:
    """What offline results and `usage` say of it, in names that stay."""
    total = [meter.prompt, meter.decode]
    hits, misses = (sum(getattr(costs, name) for costs in total) for name in ("hits", "misses"))
    return {
        "weight_bytes_used": round(sum(costs.weight_bytes for costs in total)),
        "weight_bytes_read": round(sum(costs.disk_bytes for costs in total)),
        "distinct_experts": meter.distinct_experts,
        "expert_hit_rate": hits / (hits + misses) if hits + misses else None,
        "compute_seconds": sum(costs.seconds - costs.wait_seconds for costs in total),
        "wait_seconds": sum(costs.wait_seconds for costs in total),
    }
