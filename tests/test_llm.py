"""Many texts at once, from real models: what each would be alone."""

import json
import math
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from served_model import CONTEXT, write_served_model
from test_packed_engine import SHAPE, build

import tenfold
from tenfold import LLM, SamplingParams, TenfoldError, compiled, load_model
from tenfold.checkpoint import save_model
from tenfold.engine.generation import load_generation
from tenfold.engine.request import Constraint, Request, TooLong
from tenfold.tokenizer import load_tokenizer

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")

PROMPTS = [f"{'some words, ' * (number % 9)}and number {number}" for number in range(16)]


def mixed(number: int) -> SamplingParams:
    """Greedy and drawn, long and short, penalised or not."""
    if number % 3 == 0:
        return SamplingParams(max_tokens=5 + 3 * number, temperature=0)
    penalty = {"repetition_penalty": 1.2, "presence_penalty": 0.5} if number % 3 == 1 else {"top_p": 0.8}
    return SamplingParams(max_tokens=5 + 3 * number, temperature=0.9, seed=number, **penalty)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(path)


def test_each_of_sixteen_is_what_it_is_alone(llm: LLM, path: Path) -> None:
    params = [mixed(number) for number in range(16)]
    together = llm.generate(PROMPTS, params)
    for prompt, each, got in zip(PROMPTS, params, together, strict=True):
        alone = load_generation(path, prompt, each).finish()
        assert (got.tokens, got.text, got.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
    # Again, with their beginnings in the cache, and in another company.
    assert [each.tokens for each in llm.generate(PROMPTS[:5], params[:5])] == [r.tokens for r in together[:5]]


def test_a_budget_changes_no_token(tmp_path: Path) -> None:
    path, params = write_served_model(tmp_path, 2048), [mixed(number) for number in range(6)]
    with pytest.raises(TenfoldError) as refused:
        LLM(path, memory=1, max_sequences=4, kv_tokens=512)
    smallest = re.search(r"smallest that works is (\d+)MiB", str(refused.value))
    assert smallest
    streamed = LLM(path, memory=f"{smallest[1]}MiB", max_sequences=4, kv_tokens=512)
    got = streamed.generate(PROMPTS[:6], params)
    assert [each.tokens for each in got] == [each.tokens for each in LLM(path).generate(PROMPTS[:6], params)]
    for result in got:
        assert result.usage["weight_bytes_read"] > 0 and 0 < result.usage["expert_hit_rate"] < 1


def test_torch_models_too(tmp_path: Path, path: Path) -> None:
    model = build(SHAPE | {"vocab_size": 2048, "eos_token_id": 2047})
    save_model(model, tmp_path, load_tokenizer(path))
    params = [mixed(number) for number in range(8)]
    for prompt, each, got in zip(PROMPTS, params, LLM(tmp_path).generate(PROMPTS[:8], params), strict=False):
        assert got.tokens == load_generation(tmp_path, prompt, each).finish().tokens


def test_costs_add_up_and_count_what_was_shared(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.9, seed=5, ignore_eos=True)
    (alone,) = llm.generate(["one text that nobody shares"], params)
    several = llm.generate([f"text {n} of several" for n in range(8)], params)
    assert alone.meter.decode.tokens == 19 and alone.meter.prompt.tokens == len(alone.prompt_ids)
    assert alone.usage["distinct_experts"] <= 3 * 32
    assert alone.usage["weight_bytes_read"] == 0 and alone.usage["expert_hit_rate"] == 1
    shared = [each.usage["weight_bytes_used"] for each in several]
    assert max(shared) < alone.usage["weight_bytes_used"] / 2  # eight texts read the weights once a step


def test_a_beginning_that_is_known_is_not_read_again(llm: LLM) -> None:
    start = "a beginning that two conversations share, longer than a block of the cache " * 2
    params = SamplingParams(max_tokens=3, temperature=0)
    (first,) = llm.generate([start + "one"], params)
    (second,) = llm.generate([start + "two"], params)
    assert first.meter.cached_tokens == 0 and second.meter.cached_tokens == 128
    assert second.meter.prompt.tokens == len(second.prompt_ids) - 128


def test_several_texts_of_one_prompt_draw_with_seeds_that_follow(llm: LLM) -> None:
    ids = llm.tokenizer.encode("once")
    (several,) = llm.run([Request(ids, SamplingParams(max_tokens=8, seed=3), n=3)])
    for index, text in enumerate(several):
        (alone,) = llm.generate([ids], SamplingParams(max_tokens=8, seed=3 + index))
        assert text.tokens == alone.tokens
    assert len({tuple(text.tokens) for text in several}) == 3


def test_logprobs_are_the_models(tmp_path: Path, path: Path) -> None:
    model = build(SHAPE | {"vocab_size": 2048})
    save_model(model, tmp_path, load_tokenizer(path))
    llm = LLM(tmp_path)
    ids = llm.tokenizer.encode("what was said before")
    params = SamplingParams(max_tokens=4, temperature=0, logit_bias={"7": -1.0})
    ((got,),) = llm.run([Request(ids, params, logprobs=2, prompt_logprobs=1)])
    whole = torch.tensor([[*ids, *got.tokens]])
    wanted = load_model(tmp_path)(whole)[0].log_softmax(-1)
    assert got.prompt_logprobs is not None and got.prompt_logprobs[0] is None
    told = [*got.prompt_logprobs[1:], *got.logprobs]
    assert [one.token for one in told if one] == whole[0, 1:].tolist()
    for position, one in enumerate(told):
        assert one is not None
        assert one.logprob == pytest.approx(wanted[position, one.token].item(), abs=1e-4)
        assert one.top[0] == (
            int(wanted[position].argmax()),
            pytest.approx(wanted[position].max().item(), abs=1e-4),
        )


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        (Constraint("regex", "(yes|no), [0-9]{3}"), lambda text: re.fullmatch("(yes|no), [0-9]{3}", text)),
        (Constraint("json_schema", '{"enum": ["north", "south"]}'), lambda text: json.loads(text)),
        (Constraint("grammar", 'start: "a"+ "b"'), lambda text: re.fullmatch("a+b", text)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_constraints_in_a_batch(llm: LLM, constraint: Constraint, fits: object) -> None:
    ids = llm.tokenizer.encode("say")
    params = SamplingParams(max_tokens=100, seed=1)
    bound = Request(ids, params, n=3, constraint=constraint)
    results, _ = llm.run([bound, Request(ids, params)])
    for result in results:
        assert fits(result.text) and result.finish_reason == "stop"  # type: ignore[operator]


def test_chats(llm: LLM) -> None:
    said = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "goodbye"}]]
    first, second = llm.chat(said, SamplingParams(max_tokens=4, temperature=0))
    assert first.text and llm.tokenizer.decode(first.prompt_ids).endswith("<|im_start|>assistant\n")
    assert len(second.tokens) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([2048], {}, "token id 2048 is none"),
        ([1] * CONTEXT, {}, f"the prompt has {CONTEXT} tokens"),
        ([1], {"logit_bias": {"5000": 1.0}}, "logit_bias: 5000"),
        ([1], {"stop_token_ids": [2048]}, "stop_token_ids: 2048"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_generated(
    llm: LLM, prompt: list[int], params: dict[str, object], message: str
) -> None:
    with pytest.raises(TenfoldError, match=message):
        llm.run([Request([1, 2], SamplingParams(max_tokens=2)), Request(prompt, SamplingParams(**params))])


def test_settings_that_contradict_each_other(path: Path) -> None:
    with pytest.raises(TenfoldError, match="a KV cache of 100 tokens is less than the context of 256"):
        LLM(path, kv_tokens=100)
    with pytest.raises(TenfoldError, match="2 params for 1 prompts"):
        LLM(path).generate(["a"], [SamplingParams()] * 2)
    with pytest.raises(TooLong):
        LLM(path, context=8).generate([list(range(8))], SamplingParams())


def test_ctrl_c_ends_the_texts_and_not_the_engine(llm: LLM) -> None:
    params = SamplingParams(max_tokens=240, temperature=0, ignore_eos=True)
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            llm.generate(PROMPTS, params)
    short = params.model_copy(update={"max_tokens": 5})
    (again,) = llm.generate(PROMPTS[:1], short)
    assert len(again.tokens) == 5 and math.isfinite(again.meter.decode.seconds)


def test_it_is_at_hand() -> None:
    assert tenfold.LLM is LLM and tenfold.SamplingParams is SamplingParams
