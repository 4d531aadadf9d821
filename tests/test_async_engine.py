"""The engine behind a server: it never blocks, forgets nobody, and says so when it breaks."""

import asyncio

import pytest
from fake_runner import expected, fake_config, fake_engine

from tenfold.engine.async_engine import AsyncLLM
from tenfold.engine.request import Overloaded, Request, Stopped, TooLong
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams


def greedy(tokens: int = 8, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **more)


async def tokens_of(engine: AsyncLLM, request: Request) -> dict[int, list[int]]:
    """By text."""
    found: dict[int, list[int]] = {}
    async for piece in engine.submit(request):
        found.setdefault(piece.index, []).extend(token.id for token in piece.tokens)
    return found


def run(work: object) -> object:
    return asyncio.run(asyncio.wait_for(work, 30))  # type: ignore[arg-type]


def test_many_at_once_are_each_what_they_are_alone() -> None:
    async def work() -> None:
        engine = fake_engine()
        config = fake_config(engine.facts.vocab_size)
        requests = [Request([1 + n, 2, 3] * (1 + n), greedy(5 + n), n=1 + n % 3) for n in range(20)]
        answers = await asyncio.gather(*(tokens_of(engine, request) for request in requests))
        for request, found in zip(requests, answers, strict=True):
            wanted = expected(request.prompt_ids, request.params, config)
            assert found == dict.fromkeys(range(request.n), wanted)
        load = engine.load()
        assert (load.running, load.waiting, load.kv_blocks_used) == (
            0,
            0,
            0,
        ) and load.step_tokens > load.steps
        await engine.close(0)

    run(work())


def test_who_stops_listening_is_cancelled() -> None:
    async def work() -> None:
        engine = fake_engine(seconds=0.001)
        answers = engine.submit(Request([1, 2], greedy(400)))
        async for _ in answers:
            break
        await answers.aclose()
        while engine.load().running:
            await asyncio.sleep(0.01)
        assert answers.meter.decode.tokens < 300
        assert engine.load().kv_blocks_used == 0

    run(work())


def test_a_full_queue_and_a_long_prompt_are_refused() -> None:
    async def work() -> None:
        engine = fake_engine(seconds=0.001, max_sequences=1, max_queue=2)
        kept = [engine.submit(Request([1], greedy(300)))]
        while not engine.load().running:
            await asyncio.sleep(0.01)
        kept += [engine.submit(Request([2], greedy(300))) for _ in range(2)]
        with pytest.raises(Overloaded, match="2 requests are waiting already"):
            engine.submit(Request([3], greedy()))
        with pytest.raises(TooLong):
            engine.submit(Request([3] * 512, greedy()))
        for answer in kept:
            await answer.aclose()
        while engine.load().running or engine.load().waiting:
            await asyncio.sleep(0.01)
        assert len((await tokens_of(engine, Request([3], greedy())))[0]) == 8

    run(work())


def test_one_that_the_model_fails_on_ends_alone() -> None:
    async def work() -> None:
        engine = fake_engine()
        engine._scheduler._runner.broken.add(66)  # type: ignore[attr-defined]
        good = asyncio.create_task(tokens_of(engine, Request([1, 2, 3], greedy(30))))
        with pytest.raises(Stopped, match="expert 3 of layer 1 is damaged"):
            await tokens_of(engine, Request([66, 1], greedy()))
        wanted = expected([1, 2, 3], greedy(30), fake_config(engine.facts.vocab_size))
        assert await good == {0: wanted}

    run(work())


def test_a_crash_is_told_to_all_and_to_those_who_come_later(capsys: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        engine = fake_engine(seconds=0.001)
        answer = engine.submit(Request([1], greedy(400)))
        async for _ in answer:
            engine._scheduler._runner.begin = None  # type: ignore[method-assign]
            break
        with pytest.raises(Stopped, match="the engine stopped: TypeError"):
            await tokens_of(engine, Request([2], greedy()))
            await tokens_of(engine, Request([2], greedy()))
        assert engine.stopped and "TypeError" in engine.stopped
        await engine.close(0)

    run(work())
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("grace", [0.05, 20])
def test_closing_lets_requests_end_for_a_while(grace: float) -> None:
    async def work() -> None:
        engine = fake_engine(seconds=0.001)
        pieces = []

        async def listen() -> None:
            async for piece in engine.submit(Request([1], greedy(60))):
                pieces.append(piece)  # noqa: PERF401 (seen as they come)

        listening = asyncio.create_task(listen())
        while not pieces:
            await asyncio.sleep(0.01)
        closing = asyncio.create_task(engine.close(grace))
        await asyncio.sleep(0.01)
        with pytest.raises(TenfoldError, match="shutting down"):
            engine.submit(Request([1], greedy()))
        await asyncio.gather(closing, listening)
        assert pieces[-1].finish_reason == ("cancelled" if grace < 1 else "length")

    run(work())
