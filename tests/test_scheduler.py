"""The scheduler over a model that shows every mistake with the cache as a wrong token."""

from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from fake_runner import FakeRunner, expected, fake_config, fake_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.engine import scheduler
from tenfold.engine.constraint import Matcher
from tenfold.engine.request import Constraint, Piece, Request, TooLong
from tenfold.engine.scheduler import Scheduler
from tenfold.engine.sequence import Job
from tenfold.engine.speculation import LookUp, Speculation
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams

TOKENIZER = fake_tokenizer()
CONFIG = fake_config(TOKENIZER.vocab_size)


@dataclass
class Heard:
    """What came of one text."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


class Driver:
    """A scheduler, and what it said."""

    def __init__(self, context: int = 4096, max_sequences: int = 16, **runner: int):
        self.runner = FakeRunner(CONFIG, **runner)
        self.scheduler = Scheduler(self.runner, TOKENIZER, context, max_sequences)
        self.heard: defaultdict[Job, defaultdict[int, Heard]] = defaultdict(lambda: defaultdict(Heard))
        self.errors: dict[Job, TenfoldError] = {}
        self.pieces: defaultdict[Job, list[Piece]] = defaultdict(list)

    def submit(self, prompt: list[int], n: int = 1, **params: object) -> Job:
        return self.ask(Request(prompt, SamplingParams(**params), n))

    def ask(self, request: Request) -> Job:
        job = self.scheduler.prepare(request)
        self.scheduler.add(job)
        return job

    def step(self) -> None:
        for job, news in self.scheduler.step():
            if isinstance(news, TenfoldError):
                self.errors[job] = news
                continue
            self.pieces[job].append(news)
            heard = self.heard[job][news.index]
            assert heard.finish_reason is None, "a piece after the last"
            heard.tokens += [token.id for token in news.tokens]
            heard.text += news.text
            heard.finish_reason = news.finish_reason

    def run(self, most: int = 20_000) -> None:
        for _ in range(most):
            if not self.scheduler.busy:
                break
            self.step()
        assert not self.scheduler.busy, "somebody waits for ever"
        assert self.scheduler.blocks.used == 0, "a block has leaked"

    def check(self, job: Job) -> None:
        """Its texts are what the model says to each alone."""
        request, context = job.request, self.scheduler.context
        for index in range(request.n):
            heard = self.heard[job][index]
            wanted = expected(request.prompt_ids, request.params, CONFIG, index, context)
            assert heard.tokens == wanted
            assert heard.text == TOKENIZER.decode(wanted)
            full = min(request.params.max_tokens, context - len(request.prompt_ids))
            assert heard.finish_reason == ("length" if len(wanted) == full else "stop")


def test_drafts_leave_room_for_all_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speculation, "wanted", lambda *_: 4)
    monkeypatch.setattr(LookUp, "drafts", lambda _, most: [1, 2, 3, 4][:most])
    driver = Driver(max_sequences=8, max_tokens=16)
    jobs = [driver.submit([1, 2, n], max_tokens=12, temperature=0) for n in range(1, 9)]
    driver.run()
    for job in jobs:
        driver.check(job)


def test_one_constraint_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_constraint(*given: object) -> Matcher:
        compiled.append(given)
        return original(*given)  # type: ignore[arg-type]

    original = scheduler.compile_constraint
    monkeypatch.setattr(scheduler, "compile_constraint", compile_constraint)
    driver, digits = Driver(), Constraint("regex", "[0-9]{3,40}")
    params = SamplingParams(max_tokens=50)
    jobs = [driver.ask(Request([1, n], params, n=2, constraint=digits)) for n in range(1, 9)]
    driver.run()
    assert len(compiled) == 1 and not driver.errors
    assert all(heard.text.isdecimal() for job in jobs for heard in driver.heard[job].values())


def test_one_request() -> None:
    driver = Driver()
    job = driver.submit(list(range(1, 40)), max_tokens=30, temperature=0)
    driver.run()
    driver.check(job)


prompts = st.builds(
    lambda family, length: [(family * 7 + i * i) % 40 + 1 for i in range(length)],
    st.integers(0, 2),
    st.integers(1, 60),
)
"""Many share a beginning."""
requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.integers(1, 24),
        "temperature": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 3),
        "n": st.integers(1, 3),
        "ignore_eos": st.booleans(),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(requests, st.integers(0, 12), st.none() | st.integers(0, 60)), min_size=1, max_size=12
    ),
    st.integers(3, 30),
    st.sampled_from([2, 4, 16]),
    st.integers(1, 8),
    st.sampled_from([8, 24, 512]),
)
def test_every_text_is_what_it_is_alone(
    timed: list[tuple[dict, int, int | None]],
    num_blocks: int,
    block_size: int,
    max_sequences: int,
    max_tokens: int,
) -> None:
    """Whatever comes, whenever it comes and whoever gives up; in a cache that is much too small."""
    driver = Driver(
        max_sequences=max_sequences, num_blocks=num_blocks, block_size=block_size, max_tokens=max_tokens
    )
    jobs, cancels = [], defaultdict(list)
    step = 0
    for fields, pause, cancel in timed:
        for _ in range(pause):
            driver.step()
            step += 1
            for job in cancels.pop(step, ()):
                driver.scheduler.cancel(job)
        try:
            job = driver.submit(**fields)
        except TooLong:
            assert len(fields["prompt"]) >= driver.scheduler.context
            continue
        jobs.append((job, cancel is None))
        if cancel is not None:
            cancels[step + 1 + cancel].append(job)
    while driver.scheduler.busy and step < 20_000:
        driver.step()
        step += 1
        for job in cancels.pop(step, ()):
            driver.scheduler.cancel(job)
    driver.run()
    assert not driver.errors
    for job, stays in jobs:
        if stays:
            driver.check(job)
        assert not job.unfinished
