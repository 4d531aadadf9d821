"""An engine that answers what it is told to, for tests of the server. It has no model."""

import asyncio
from collections.abc import AsyncGenerator, Callable

from tenfold.chat_template import ChatTemplate
from tenfold.engine.request import (
    Costs,
    Load,
    Logprob,
    Meter,
    ModelFacts,
    Overloaded,
    Piece,
    Request,
    Token,
    TooLong,
)
from tenfold.errors import TenfoldError
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

CHATML = (
    "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools> answer with <tool_call>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not that') }}{% endif %}"
    "{% if m.content == 'slow' %}{{ range(99999) | map('string') | join | replace('1', 'a' * 10**6) }}"
    "{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the cat sat on the mat, and the dog looked on. café ☕ naïve"


def tokenizer_with(template: str | None = CHATML) -> Tokenizer:
    raw = train_bpe(iter([WORDS] * 9), 320)
    found = None if template is None else ChatTemplate({"default": template}, "toy")
    return Tokenizer(raw, {"eos_token": END_OF_TEXT}, chat_template=found)


class ScriptedEngine:
    """Answers `reply(request, index)`: a token every `delay` seconds. `room` requests fit at once."""

    def __init__(
        self,
        reply: str | Callable[[Request, int], str] = "the cat sat",
        template: str | None = CHATML,
        delay: float = 0.0,
        room: int = 100,
        context: int = 2048,
    ) -> None:
        self.tokenizer = tokenizer_with(template)
        self.reply = reply if callable(reply) else lambda request, index: reply
        self.delay, self.room, self.closing = delay, room, False
        self.stopped: str | None = None
        self.requests: list[Request] = []
        self.answers: list[ScriptedAnswer] = []
        self.facts = ModelFacts(
            name="toy",
            context=context,
            vocab_size=self.tokenizer.vocab_size,
            num_params=1000,
            num_active_params=100,
            num_layers=2,
            sparse_layers=[1],
            num_experts=8,
            num_experts_per_tok=2,
            memory_bytes=None,
        )

    @property
    def running(self) -> list["ScriptedAnswer"]:
        return [answer for answer in self.answers if not answer.over]

    def submit(self, request: Request) -> "ScriptedAnswer":
        if self.closing:
            raise TenfoldError("no more")
        if len(self.running) >= self.room:
            raise Overloaded("the queue is full")
        if len(request.prompt_ids) >= self.facts.context:
            raise TooLong(f"the prompt has {len(request.prompt_ids)} tokens, of {self.facts.context}")
        if not request.prompt_ids or max(request.prompt_ids) >= self.facts.vocab_size:
            raise TenfoldError("that is no prompt")
        if request.constraint and request.constraint.text == "bad":
            raise TenfoldError("json_schema: that is no schema")
        self.requests.append(request)
        self.answers.append(ScriptedAnswer(self, request))
        return self.answers[-1]

    def load(self) -> Load:
        return Load(len(self.running), 0, 64, 3, 10**6, 7, 14, 1, 30, 10, 4096)

    async def close(self, grace: float) -> None:
        self.closing = True
        end = asyncio.get_running_loop().time() + grace
        while self.running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        for answer in self.running:
            answer.cancelled = True


def logprob_of(token: int, top: int) -> Logprob:
    likeliest = [(token, -0.5), *((other, -2.0 - other / 100) for other in range(top) if other != token)]
    return Logprob(token, -0.5, likeliest[:top])


class ScriptedAnswer:
    def __init__(self, engine: ScriptedEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self.cancelled = self.over = False
        count = len(request.prompt_ids)
        self.meter = Meter(
            prompt=Costs(count, 1000.0 * count, 0, 2, 1, 0.5, 0.1), cached_tokens=1, distinct_experts=3
        )

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        try:
            texts = [self._pieces(index) for index in range(self._request.n)]
            while texts:
                if self._engine.delay:
                    await asyncio.sleep(self._engine.delay)
                for pieces in list(texts):
                    piece = next(pieces)
                    if self.cancelled:
                        piece.finish_reason = "cancelled"
                    yield piece
                    if piece.finish_reason:
                        texts.remove(pieces)
        finally:
            self.over = True

    def _pieces(self, index: int):
        request, decode = self._request, self._engine.tokenizer.decode
        text = self._engine.reply(request, index)
        ids = self._engine.tokenizer.encode(text, add_special_tokens=False)
        prompt = None
        if request.prompt_logprobs is not None and index == 0:
            prompt = [None, *(logprob_of(t, request.prompt_logprobs) for t in request.prompt_ids[1:])]
        shown, most = "", request.params.max_tokens
        if not ids:
            yield Piece(index, "", [], "stop", prompt)
        for number, token in enumerate(ids[:most], 1):
            told = None if request.logprobs is None else logprob_of(token, request.logprobs)
            experts = [[token % 8, -1]] if request.routes else None
            last = number == min(len(ids), most)
            whole = decode(ids[:number])
            new = whole[len(shown) :] if last or not whole.endswith("\ufffd") else ""
            shown += new
            self.meter.decode.tokens += 1
            self.meter.decode.seconds += 0.25
            reason = ("length" if len(ids) > most else "stop") if last else None
            yield Piece(index, new, [Token(token, told, experts)], reason, prompt)
            prompt = None

    async def aclose(self) -> None:
        self.cancelled = self.over = True
