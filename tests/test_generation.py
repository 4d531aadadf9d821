"""Generating: the KV cache, the sampler, stopping, streaming."""

import pytest
import torch

from tenfold.config import ModelConfig
from tenfold.engine.generation import Generation, generate_tokens
from tenfold.engine.kv_cache import new_kv_cache
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

SPARSE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def model_of(**fields: object) -> Transformer:
    config = ModelConfig(**{"vocab_size": 300, "max_position_embeddings": 64, **SPARSE, **fields})
    return Transformer(config.model_copy(update={"initializer_range": 0.2})).init_weights(0).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router": "sigmoid", "n_shared_experts": 1},
        {"router": "switch", "num_experts_per_tok": 1},
        {"num_key_value_heads": 1, "qk_norm": "full", "partial_rotary_factor": 0.5},
        {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0},
    ],
)
def test_cached_logits_equal_uncached(fields: dict[str, object]) -> None:
    """Prefill in pieces of several sizes, then one by one."""
    model = model_of(**fields)
    ids = torch.randint(0, 300, (2, 20))
    cache = new_kv_cache(model.config, 2, 20, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        whole = model(ids)
        pieces, start = [], 0
        for size in (7, 5, 1, 4, 1, 1, 1):
            pieces.append(model(ids[:, start : start + size], cache, start))
            start += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


def test_greedy_tokens_are_the_likeliest_without_a_cache() -> None:
    model, prompt = model_of(), [5, 17, 200]
    got = list(generate_tokens(model, prompt, SamplingParams(max_tokens=12, temperature=0)))
    ids = list(prompt)
    for token in got:
        with torch.inference_mode():
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(got) == 12


def test_same_seed_same_tokens_and_other_seed_others() -> None:
    model = model_of()

    def run(seed: int) -> list[int]:
        return list(generate_tokens(model, [1], SamplingParams(max_tokens=20, seed=seed)))

    assert run(1) == run(1) != run(2)


def test_the_context_bounds_what_is_generated() -> None:
    model = model_of()
    assert len(list(generate_tokens(model, [1] * 60, SamplingParams(max_tokens=50)))) == 4
    with pytest.raises(TenfoldError, match="max_position_embeddings"):
        next(generate_tokens(model, [1] * 64, SamplingParams()))
    with pytest.raises(TenfoldError, match="empty"):
        next(generate_tokens(model, [], SamplingParams()))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    raw = train_bpe(iter(["the cat sat on the mat", "café ☕ naïve"]), 300)
    return Tokenizer(raw, {"eos_token": END_OF_TEXT})


class Scripted(torch.nn.Module):
    """A model that says what it is told to, whatever it reads."""

    def __init__(self, tokens: list[int], vocab: int):
        super().__init__()
        self.config = ModelConfig(vocab_size=vocab, eos_token_id=0)
        self.embed_tokens = torch.nn.Embedding(vocab, 1)
        self.logits = torch.nn.Identity()
        self.tokens = iter(tokens)

    def hidden_states(self, ids: torch.Tensor, *_: object) -> tuple[torch.Tensor, list]:
        logits = torch.zeros(1, ids.shape[1], self.config.vocab_size)
        logits[0, -1, next(self.tokens)] = 1
        return logits, []


def scripted(text: str, tokenizer: Tokenizer, **params: object) -> Generation:
    model = Scripted([*tokenizer.encode(text), 0], tokenizer.vocab_size)
    greedy = SamplingParams(temperature=0, **params)
    return Generation(model, tokenizer, "the", greedy)


@pytest.mark.parametrize("text", ["the cat sat", "café ☕ naïve", "☕☕", "a\nb  c"])
def test_the_pieces_are_the_text(text: str, tokenizer: Tokenizer) -> None:
    generation = scripted(text, tokenizer)
    pieces = list(generation)
    assert "".join(pieces) == generation.text == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert generation.finish_reason == "stop"


def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(tokenizer: Tokenizer) -> None:
    generation = scripted("the cat sat on the mat", tokenizer, stop=["at on"])
    assert "".join(generation) == "the cat s"
    assert generation.finish_reason == "stop"


def test_a_half_stop_string_is_text_after_all(tokenizer: Tokenizer) -> None:
    assert "".join(scripted("the cat", tokenizer, stop=["cats"])) == "the cat"


def test_a_stop_string_that_ends_inside_a_character_is_not_begun(tokenizer: Tokenizer) -> None:
    """The token before it ends in half a character: what is sure of it may be a stop string begun."""
    generation = scripted("ab☕cd", tokenizer, stop=["ab☕"])
    assert "".join(generation) == ""


def test_the_context_running_out_is_no_stop(tokenizer: Tokenizer) -> None:
    model, endless = model_of(eos_token_id=None), Tokenizer(tokenizer.raw)
    generation = Generation(model, endless, "the cat", SamplingParams(max_tokens=500, seed=0)).finish()
    assert generation.finish_reason == "length"
    assert len(generation.tokens) + len(generation.prompt_ids) == 64


def test_max_tokens_is_named_as_the_reason(tokenizer: Tokenizer) -> None:
    generation = scripted("the cat sat on the mat", tokenizer, max_tokens=2).finish()
    assert generation.finish_reason == "length"
    assert len(generation.tokens) == 2
