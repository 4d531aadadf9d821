"""A model of tenfold's as lm-eval (EleutherAI's lm-evaluation-harness) wants to ask it.

Scores are those of lm-eval's own class for transformers, `HFLM`: the same tokens before a text, the same
split of context and continuation, the same cuts where a text is too long.
"""

from collections.abc import Iterator
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from pydantic import ValidationError

from tenfold.errors import TenfoldError
from tenfold.evaluate.scoring import Text
from tenfold.evaluate.subject import Subject
from tenfold.parsed import first_problem
from tenfold.sampling import SamplingParams
from tenfold.train.split import progress_bar

AT_ONCE = 256
"""Requests whose tokens are in memory together."""
MAX_NEW_TOKENS = 256
"""Where a task does not say: lm-eval's own default."""
CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where a message that the model is to go on with ends in the rendered text, as in transformers."""


class TenfoldLM(TemplateLM):  # type: ignore[misc]
    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self._subject = subject
        self._tokenizer = subject.tokenizer

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._subject.first_token

    @property
    def max_length(self) -> int:
        return self._subject.context

    @property
    def tokenizer_name(self) -> str:
        return self._subject.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            first = self._tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, first)
        return self._tokenizer.encode(string, add_special_tokens)

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for part in _parts(requests, "choices"):
            found += super().loglikelihood(part, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        order = self._order(requests)
        scores = self._subject.scorer.scores(self._text(*requests[n]) for n in order)
        found = dict(zip(order, scores, strict=True))
        return [(found[n].logprob, found[n].greedy) for n in range(len(requests))]

    def _order(self, requests: list[tuple[tuple[str, str], list[int], list[int]]]) -> list[int]:
        """One answer of each of some questions, then the others: these find the question in the cache."""
        keys, tokens = [], 0
        for question, answers in groupby(requests, key=itemgetter(1)):
            tokens += len(question)
            some = 2 * tokens // self._subject.scorer.positions
            different: dict[tuple[int, ...], int] = {}
            for _, _, continuation in answers:
                rank = different.setdefault(tuple(continuation[:-1]), len(different))
                keys.append((some, rank))
        return sorted(range(len(requests)), key=keys.__getitem__)

    def _text(self, strings: tuple[str, str], context: list[int], continuation: list[int]) -> Text:
        if not 1 <= (length := len(continuation)) <= self.max_length:
            what = f"the continuation {strings[1]!r:.60}"
            raise TenfoldError(
                f"{what} has {length} tokens: it must have 1 to {self.max_length}, the context"
            )
        return Text((context + continuation)[-self.max_length - 1 : -1], continuation)

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        found = []
        for part in _parts(requests, "texts"):
            texts = [list(self._windows(request.args[0])) for request in part]
            scores = self._subject.scorer.scores(chain.from_iterable(texts))
            found += [sum(next(scores).logprob for _ in windows) for windows in texts]
        return found

    def _windows(self, text: str) -> Iterator[Text]:
        return self._subject.windows(self.tok_encode(text), stride=self.max_length)

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        params = [self._sampling(request.args[1], seed) for seed, request in enumerate(requests)]
        prompts = [
            self.tok_encode(request.args[0])[each.max_tokens - self.max_length :]
            for request, each in zip(requests, params, strict=True)
        ]
        return [
            # A stop string may have been written with special tokens, which are left out of the text.
            postprocess_generated_text(
                self._tokenizer.decode(result.tokens, skip_special_tokens=True), each.stop, None
            )
            for result, each in zip(self._subject.llm.generate(prompts, params), params, strict=True)
        ]

    def _sampling(self, wanted: dict[str, Any], seed: int) -> SamplingParams:
        """What a task's generation_kwargs ask for. A repeated question has a seed of its own each time."""
        fields: dict[str, Any] = normalize_gen_kwargs(wanted, MAX_NEW_TOKENS)
        sampled, temperature = fields.pop("do_sample"), fields.pop("temperature", 1.0)
        end = None if self.eot_token_id is None else self._tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(fields.pop("until"), end)
        fields |= {
            "max_tokens": fields.pop("max_gen_toks"),
            "temperature": temperature if sampled else 0,
            "stop": [text for text in stop if text],
            "seed": seed,
        }
        if fields["max_tokens"] >= self.max_length:
            raise TenfoldError(
                f"a task asks for {fields['max_tokens']:,} new tokens, which leave no room for the question"
                f" in a context of {self.max_length:,}"
            )
        try:
            return SamplingParams.model_validate(fields)
        except ValidationError as error:
            raise TenfoldError(f"generation_kwargs of a task: {first_problem(error)}") from None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Without a prompt for the answer, the last message is one to go on with, and is left open."""
        history = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            history[-1]["content"] += CONTINUED
        try:
            text = self._rendered(history, add_generation_prompt)
        except TenfoldError:
            if all(message["role"] != "system" for message in history):
                raise
            # Some templates refuse a system message: lm-eval leaves it out.
            history = [message for message in history if message["role"] != "system"]
            text = self._rendered(history, add_generation_prompt)
        if add_generation_prompt:
            return text
        before, found, after = text.rpartition(CONTINUED.strip())
        if not found:
            raise TenfoldError(
                f"{self._subject.name}: the chat template leaves out the message to go on with"
            )
        return before if after.startswith(" ") else before.rstrip()

    def _rendered(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            history, add_generation_prompt=add_generation_prompt, tokenize=False
        )


def _parts(requests: list[Instance], what: str) -> Iterator[list[Instance]]:
    """Some at a time, with a bar that shows how many are done."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(requests))
        for start in range(0, len(requests), AT_ONCE):
            part = requests[start : start + AT_ONCE]
            yield part
            bar.advance(task, len(part))
