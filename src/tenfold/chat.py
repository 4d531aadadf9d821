"""`tenfold chat`: a conversation with a model, in the terminal."""

import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tenfold.chat_template import TEMPLATE_BYTES
from tenfold.engine.generation import Generation, context_of
from tenfold.engine.loading import ANY, USUAL_CONTEXT, AnyModel, load_model_and_tokenizer
from tenfold.errors import TenfoldError
from tenfold.memory import Budget
from tenfold.model.switch import SwitchTransformer
from tenfold.packed import PackedModel
from tenfold.sampling import SamplingParams
from tenfold.switch_config import decoder_only
from tenfold.tokenizer import Tokenizer

FINAL_CHANNEL = "<|channel|>final<|message|>"


class Chat:
    """What was said so far (`messages`), and the model that answers.

    Raises TenfoldError for a model (`name`) without a chat template.
    """

    def __init__(
        self,
        model: AnyModel,
        tokenizer: Tokenizer,
        params: SamplingParams,
        system: str | None,
        name: str,
    ) -> None:
        if tokenizer.chat_template is None:
            raise TenfoldError(
                f"{name} has no chat template, so it was not trained to chat: write text with"
                f" `tenfold generate {name} --prompt TEXT`"
            )
        self._model, self._tokenizer, self._params = model, tokenizer, params
        decoder_only(model.config, name)
        assert not isinstance(model, SwitchTransformer)
        self.plan = model.plan if isinstance(model, PackedModel) else None
        self._context = context_of(model)
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages: list[dict[str, Any]] = list(self._opening)
        self.dropped = 0

    def answer(self, text: str) -> Generation:
        """The model's answer to a message, to be iterated; then `keep` it or `take_back` the message.

        The oldest turns are dropped, and counted in `dropped`, while what is left leaves the answer less
        room in the model's context than `max_tokens`, or than half of it.
        """
        self.messages.append({"role": "user", "content": text})
        room = min(self._params.max_tokens, self._context // 2)
        self.dropped = 0
        while True:
            ids = self._tokenizer.apply_chat_template(self.messages, add_generation_prompt=True)
            if len(ids) + room <= self._context or not self._drop_oldest_turn():
                return Generation(self._model, self._tokenizer, ids, self._params)

    def _drop_oldest_turn(self) -> bool:
        """Never the turn that is going on."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if len(asked) < 2:
            return False
        del self.messages[asked[0] : asked[1]]
        self.dropped += 1
        return True

    def keep(self, answer: str) -> None:
        """The answer becomes part of the conversation; of gpt-oss's channels, only the final one."""
        content = answer.rpartition(FINAL_CHANNEL)[2]
        self.messages.append({"role": "assistant", "content": content})

    def take_back(self) -> None:
        """The last message was not answered."""
        self.messages.pop()


def load_chat(
    model: str,
    params: SamplingParams,
    system: str | None = None,
    memory: Budget = ANY,
    context: int = USUAL_CONTEXT,
) -> Chat:
    """A conversation with a model on disk; `memory` is `load_generation`'s, `context` what it plans for."""
    memory = replace(memory, reserve=memory.reserve + TEMPLATE_BYTES)
    return Chat(*load_model_and_tokenizer(model, memory, context), params, system, model)


def talk(chat: Chat) -> None:
    """Read messages from stdin and write answers to stdout, until /exit or the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (lets `input` edit its line and recall the ones before)
    if chat.plan:
        _note(str(chat.plan))
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt)
        except EOFError:
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/reset":
            chat.reset()
            _note("the conversation begins anew")
        elif text.strip():
            _turn(chat, text)


def _turn(chat: Chat, text: str) -> None:
    """One message and its answer; what goes wrong with it does not end the conversation."""
    generation = None
    try:
        generation = chat.answer(text)
        if chat.dropped:
            _note(f"oldest turns dropped, to fit the model's context: {chat.dropped}")
        for piece in generation:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except TenfoldError as error:
        _note(str(error))
    print(flush=True)
    if generation and (line := generation.usage.line()):
        _note(line)
    if generation and generation.text:
        chat.keep(generation.text)
    else:
        chat.take_back()


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
