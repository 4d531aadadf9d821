"""The scheduler over a model that shows every mistake with the cache as a wrong token."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count

import pytest
from fake_runner import FakeRunner, expected, fake_config, fake_tokenizer, logits_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.engine import scheduler
from tenfold.engine.constraint import Matcher
from tenfold.engine.request import Constraint, Piece, Request, TooLong
from tenfold.engine.sampler import logprob
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

    def __init__(self, context: int = 4096, max_sequences: int = 16, **runner: float):
        self.runner = FakeRunner(CONFIG, **runner)
        self.scheduler = Scheduler(self.runner, TOKENIZER, context, max_sequences)
        self.heard: defaultdict[Job, defaultdict[int, Heard]] = defaultdict(lambda: defaultdict(Heard))
        self.errors: dict[Job, TenfoldError] = {}
        self.pieces: defaultdict[Job, list[Piece]] = defaultdict(list)

    def submit(self, prompt: list[int], n: int = 1, **params: object) -> Job:
        return self.ask(Request(prompt, SamplingParams(**{"temperature": 0} | params), n))

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


@settings(deadline=None, max_examples=60)
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


def test_a_short_prompt_goes_past_a_long_one() -> None:
    """At once: what is under way stops between two layers."""
    driver = Driver(num_blocks=300, seconds=1e-4)
    long = driver.submit([1 + n % 40 for n in range(4000)], max_tokens=3)
    driver.step()
    short = driver.submit([5, 6, 7], max_tokens=3)
    while short not in driver.heard:
        driver.step()
    assert driver.scheduler.active[0].job is long
    assert driver.scheduler.active[0].cached == 0  # its first piece is under way
    driver.run()
    driver.check(short)
    driver.check(long)


def test_short_prompts_without_end_do_not_starve_a_long_one() -> None:
    driver = Driver(num_blocks=300, seconds=1e-4)
    long = driver.submit([1 + n % 40 for n in range(1500)], max_tokens=1)
    for number in range(3000):
        if long in driver.heard:
            break
        driver.submit([1 + number % 40] * (1 + number % 200), max_tokens=1, seed=number)
        driver.step()
    assert long in driver.heard


def test_streams_go_on_while_a_long_prompt_is_read() -> None:
    driver = Driver(num_blocks=300)
    stream = driver.submit([1, 2, 3], max_tokens=400, ignore_eos=True)
    while stream not in driver.heard:
        driver.step()
    long = driver.submit([1 + n % 40 for n in range(4000)], max_tokens=1)
    before = len(driver.heard[stream][0].tokens)
    driver.step()
    while driver.scheduler.active[-1].job is long and long not in driver.heard:
        driver.step()
    during = len(driver.heard[stream][0].tokens) - before
    # At least one token for every piece of the prompt, and mostly one for every few layers of each.
    assert during >= -(-4000 // 512)
    driver.run()
    driver.check(stream)


def test_short_prompts_share_a_pass() -> None:
    driver = Driver()
    jobs = [driver.submit([n + 1] * 20, max_tokens=5) for n in range(10)]
    driver.run()
    assert [len(chunks) for chunks in driver.runner.passes[:2]] == [10, 10]
    for job in jobs:
        driver.check(job)


def test_the_texts_of_one_prompt_share_its_blocks() -> None:
    driver = Driver(num_blocks=40, block_size=16)
    job = driver.submit([1 + n % 40 for n in range(320)], n=5, max_tokens=12, seed=1, ignore_eos=True)
    most = 0
    while driver.scheduler.busy:
        driver.step()
        most = max(most, driver.scheduler.blocks.used)
    assert most <= 20 + 5 * 2  # five times 21 would not fit
    assert driver.scheduler.preemptions == 0
    driver.check(job)


def test_the_youngest_gives_way_and_still_comes_to_its_end() -> None:
    driver = Driver(num_blocks=8, block_size=4)
    jobs = [driver.submit([n + 1] * 4, max_tokens=20, ignore_eos=True, seed=n) for n in range(4)]
    ended: list[Job] = []
    while driver.scheduler.busy:
        driver.step()
        ended += [job for job in jobs if job not in ended and not job.unfinished]
    assert driver.scheduler.preemptions > 0
    assert ended == jobs
    for job in jobs:
        driver.check(job)


@settings(deadline=None, max_examples=30)
@given(st.lists(requests, min_size=1, max_size=6), st.booleans())
def test_guesses_change_no_token(every: list[dict], seldom: bool) -> None:
    """With drafts in every step, or in every other: whether they pay is left to the clock elsewhere."""
    driver = Driver(num_blocks=60, block_size=4)
    turns = count()
    driver.scheduler._speculation.wanted = lambda _: 4 * (seldom or next(turns) % 2)  # type: ignore[method-assign]
    jobs = [driver.submit(**fields | {"prompt": [1, 2, 3, 1, 2, 3] + fields["prompt"]}) for fields in every]
    driver.run()
    for job in jobs:
        driver.check(job)


def test_guesses_make_several_tokens_a_step() -> None:
    driver = Driver()
    driver.scheduler._speculation.wanted = lambda _: 4  # type: ignore[method-assign]
    params = {"max_tokens": 300, "ignore_eos": True, "temperature": 0, "logit_bias": {"7": 100.0}}
    job = driver.submit([7] * 8, **params)
    driver.run()
    driver.check(job)
    assert driver.scheduler.steps < 300 / 4
    assert job.meter.accepted > 200 and job.meter.drafted >= job.meter.accepted
    assert job.meter.decode.tokens == 299


@pytest.mark.parametrize("beside", [0, 4])
def test_one_that_fails_takes_nobody_with_it(beside: int) -> None:
    """In its prompt, and in the middle of its text."""
    driver = Driver()
    driver.runner.broken = {290, 44}
    good = [driver.submit([n + 1] * 9, max_tokens=12, ignore_eos=True) for n in range(beside)]
    bad = driver.submit([290] * 9)
    late = driver.submit([9] * 9, max_tokens=12, logit_bias={"44": 100.0})
    driver.run()
    assert set(driver.errors) == {bad, late}
    assert "expert 3 of layer 1" in str(driver.errors[late])
    assert driver.heard[late][0].tokens == [44]
    for job in good:
        driver.check(job)


def test_a_prompts_logprobs_are_told_once_whatever_happens() -> None:
    """In pieces, with a known beginning, and computed twice."""
    driver = Driver(num_blocks=10, block_size=4, max_tokens=8)
    prompt = [1 + n * n % 40 for n in range(30)]
    older = driver.submit([3, 4, 5], max_tokens=30, ignore_eos=True)
    driver.step()
    for _ in range(2):
        job = driver.ask(Request(prompt, SamplingParams(max_tokens=8, ignore_eos=True, seed=4), 2, 1, 2))
        driver.run()
        driver.check(job)
        told = [piece.prompt for piece in driver.pieces[job] if piece.prompt is not None]
        assert driver.scheduler.preemptions > 0
        assert len(told) == 1 and driver.pieces[job][0].prompt is told[0]
        assert told[0][0] is None and [one.token for one in told[0][1:]] == prompt[1:]
        for position, one in enumerate(told[0][1:], 1):
            wanted = logprob(logits_of(prompt[:position], CONFIG.vocab_size), prompt[position], 2)
            assert one.logprob == pytest.approx(wanted.logprob) and len(one.top) == 2
    driver.check(older)


def test_routes_and_costs_of_each_token() -> None:
    driver = Driver()
    jobs = [
        driver.ask(Request([n + 1] * 30, SamplingParams(max_tokens=9, ignore_eos=True), routes=True))
        for n in range(3)
    ]
    driver.run()
    for job in jobs:
        tokens = [token for piece in driver.pieces[job] for token in piece.tokens]
        before = [job.request.prompt_ids[-1], *(token.id for token in tokens)]
        assert [token.experts for token in tokens] == [[[id_ % 8, -1]] * 2 for id_ in before[:-1]]
        used = {token % 8 for token in (*job.request.prompt_ids, *before[:-1])}
        assert job.meter.distinct_experts == 2 * len(used)
        assert (job.meter.prompt.tokens, job.meter.decode.tokens) == (30, 8)
    hits = sum(costs.hits for job in jobs for costs in (job.meter.prompt, job.meter.decode))
    assert hits == pytest.approx(driver.scheduler.hits) and hits > 0


def test_drafts_are_kept_to_what_a_pass_holds() -> None:
    driver = Driver(max_tokens=8, max_sequences=8)
    driver.scheduler._speculation.wanted = lambda _: 4  # type: ignore[method-assign]
    params = {"max_tokens": 20, "ignore_eos": True, "logit_bias": {"7": 100.0}}
    jobs = [driver.submit([7] * 5, **params) for _ in range(8)]
    driver.run()
    for job in jobs:
        driver.check(job)
