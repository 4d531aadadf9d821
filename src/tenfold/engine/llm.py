"""Many texts at once, offline: `LLM(path).generate(prompts, params)`."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from tenfold.engine.blocks import Blocks
from tenfold.engine.generation import encode_prompt
from tenfold.engine.loading import USUAL_CONTEXT, open_batch_runner
from tenfold.engine.request import FinishReason, Logprob, Meter, Piece, Request, describe
from tenfold.engine.scheduler import Scheduler
from tenfold.engine.sequence import Job
from tenfold.errors import TenfoldError
from tenfold.memory import Budget, parse_size
from tenfold.sampling import SamplingParams

Prompt = str | Sequence[int]


@dataclass
class Result:
    """One text."""

    prompt_ids: Sequence[int]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    """Of `tokens`, if the request asks for them."""
    prompt_logprobs: Sequence[Logprob | None] | None = None
    meter: Meter = field(default_factory=Meter)
    """Of the whole request, all its n texts."""

    @property
    def usage(self) -> dict[str, Any]:
        return describe(self.meter)

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += [token.id for token in piece.tokens]
        self.logprobs += [token.logprob for token in piece.tokens if token.logprob is not None]
        self.finish_reason = piece.finish_reason
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt


class LLM:
    """A model and its tokenizer, for any number of texts: as many at once as `max_sequences` and its KV cache
    allow, the others after them."""

    def __init__(
        self,
        path: str | Path,
        memory: int | str | Budget | None = None,
        context: int = USUAL_CONTEXT,
        max_sequences: int = 16,
        kv_tokens: int | None = None,
    ):
        """`path` is a directory, a .gguf file or a hub id; `memory` bytes, or a text such as "8GiB", that the
        whole process keeps to (packed models alone). Raises TenfoldError as `open_batch_runner` does."""
        limit = parse_size(memory) if isinstance(memory, str) else memory
        budget = limit if isinstance(limit, Budget) else Budget(limit)
        opened = open_batch_runner(path, budget, context, max_sequences, kv_tokens)
        self.tokenizer, self.runner = opened.tokenizer, opened.runner
        self._new_scheduler = partial(Scheduler, opened.runner, opened.tokenizer, context, max_sequences)
        self._scheduler = self._new_scheduler()

    @property
    def blocks(self) -> Blocks:
        """Of the KV cache: what else runs on `runner` takes its own from them."""
        return self._scheduler.blocks

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Result]:
        """A text for each prompt, in their order. `params` are those of all, or each its own.

        Raises TenfoldError for a prompt that is empty or too long, before anything is generated.
        """
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise TenfoldError(
                f"{len(params)} params for {len(prompts)} prompts: give each its own, or all one"
            )
        asked = zip(prompts, params, strict=True)
        requests = [Request(encode_prompt(self.tokenizer, prompt), each) for prompt, each in asked]
        return [results[0] for results in self.run(requests)]

    def chat(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Result]:
        """The next answer in each conversation, in the model's own chat template."""
        prompts = [
            self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt=True)
            for messages in conversations
        ]
        return self.generate(prompts, params)

    def run(self, requests: Sequence[Request]) -> list[list[Result]]:
        """The n texts of each request. Ctrl-C ends all of them, and the engine can be used again.

        Raises TenfoldError for a request that cannot be done, and for one that fails under way.
        """
        jobs = [self._scheduler.prepare(request) for request in requests]
        results = {
            job: [Result(job.request.prompt_ids, meter=job.meter) for _ in range(job.request.n)]
            for job in jobs
        }
        for job in jobs:
            self._scheduler.add(job)
        try:
            self._step_through(results)
        except TenfoldError:
            for job in jobs:
                self._scheduler.cancel(job)
            raise
        except BaseException:  # Ctrl-C, anywhere in its books
            self._scheduler = self._new_scheduler()
            raise
        return [results[job] for job in jobs]

    def _step_through(self, results: Mapping[Job, Sequence[Result]]) -> None:
        hidden = len(results) < 2 or not sys.stderr.isatty()
        with Progress(console=Console(stderr=True), disable=hidden) as progress:
            task = progress.add_task("texts", total=sum(map(len, results.values())))
            while self._scheduler.busy:
                for job, news in self._scheduler.step():
                    if job not in results:  # of a run before, that failed
                        continue
                    if isinstance(news, TenfoldError):
                        raise news
                    results[job][news.index].add(news)
                    progress.advance(task, news.finish_reason is not None)
