"""Switch Transformers against transformers: logits, tokens, gradients, files; padding; full experts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from tenfold.checkpoint import load_decoder_only, load_model, save_model
from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.families.switch import from_hf
from tenfold.engine.encoder_decoder import generate_tokens
from tenfold.errors import TenfoldError
from tenfold.kernels import EMPTY_SLOT
from tenfold.model.switch import SwitchTransformer
from tenfold.sampling import SamplingParams
from tenfold.switch_config import SwitchConfig

SEEDS = range(8)
TOKENS = 32
PROMPT = 90
each = pytest.mark.parametrize("seed", SEEDS)


def random_fields(seed: int) -> dict[str, Any]:
    """Options on and off; even seeds have so little room that long prompts find experts full."""
    rng = random.Random(seed)
    return {
        "vocab_size": rng.choice([61, 64, 97]),
        "d_model": rng.choice([17, 24, 16]),
        "d_kv": rng.choice([5, 8]),
        "d_ff": rng.choice([9, 16, 21]),
        "num_layers": rng.choice([2, 3, 5]),
        "num_decoder_layers": rng.choice([1, 3, 4]),
        "num_heads": rng.choice([1, 2, 3]),
        "num_experts": [2, 5, 3, 1][seed % 4],
        # Not below the tokens generated: decoding with a cache drops none, reading them at once would.
        "expert_capacity": TOKENS + 1 if seed % 2 == 0 else PROMPT,
        "encoder_sparse_step": [1, 2, 3, 0][seed % 4],
        "decoder_sparse_step": [2, 1, 0, 3][seed // 2 % 4],
        "router_bias": seed % 3 == 0,
        "relative_attention_num_buckets": rng.choice([4, 5, 8, 32]),
        "relative_attention_max_distance": rng.choice([20, 128]),
        "layer_norm_epsilon": rng.choice([1e-6, 1e-2]),
        "tie_word_embeddings": rng.random() < 0.5,
        "eos_token_id": None,
        "decoder_start_token_id": seed % 3,
    }


def fill(model: torch.nn.Module, seed: int = 0) -> Any:
    """Random weights that leave nothing at zero or one, so that every tensor shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter.shape[-1] if parameter.ndim > 1 else 10
        parameter.data.copy_(drawn * fan_in**-0.5 + ("norm" in name))
    return model.eval()


def build(**fields: Any) -> SwitchTransformer:
    return fill(SwitchTransformer(SwitchConfig(**random_fields(0) | fields)))


def ours_of(seed: int) -> SwitchTransformer:
    return build(**random_fields(seed))


def load_hf(path: Path) -> Any:
    model, info = SwitchTransformersForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def ids(model: Any, length: int, batch: int = 2, seed: int = 3) -> Tensor:
    """Never a pad token, by which transformers would guess a mask."""
    vocab = model.config.vocab_size
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def dropped(model: SwitchTransformer, prompt: Tensor) -> int:
    return sum(int(aux.dropped) for aux in model.encode(prompt)[1])


@each
@torch.no_grad()
def test_logits_agree_both_ways(seed: int, tmp_path: Path) -> None:
    ours = ours_of(seed)
    prompt, answer = ids(ours, PROMPT), ids(ours, 11, seed=4)
    if seed % 2 == 0 and ours.config.num_experts < 3:
        assert dropped(ours, prompt) > 0
    assert save_model(ours, tmp_path / "ours").model_type == "switch_transformers"
    theirs = load_hf(tmp_path / "ours")
    expected = theirs(prompt, decoder_input_ids=answer).logits
    close(ours(prompt, answer), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    close(back(prompt, answer), expected)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparse", [0, 1, 3])
@torch.no_grad()
def test_what_transformers_makes_is_loaded(tied: bool, sparse: int, tmp_path: Path) -> None:
    """From its own config: steps follow from the number of sparse layers, and none at all is one."""
    config = SwitchTransformersConfig(
        vocab_size=50, d_model=16, d_kv=6, d_ff=20, num_layers=3, num_decoder_layers=None, num_heads=2,
        num_sparse_encoder_layers=sparse, num_sparse_decoder_layers=sparse, tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = fill(SwitchTransformersForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path / "m")
    ours = load_model(tmp_path / "m")
    expected = theirs(ids(ours, 9), decoder_input_ids=ids(ours, 7)).logits
    close(ours(ids(ours, 9), ids(ours, 7)), expected)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    derived = {name: value for name, value in raw.items() if not name.endswith("sparse_step")}
    assert from_hf(derived, "x") == ours.config


def test_shards_and_bfloat16_round_trip(tmp_path: Path) -> None:
    ours = build(tie_word_embeddings=True, num_experts=1)  # more, and rounding may choose another
    save_model(ours, tmp_path / "m", dtype=torch.bfloat16, max_shard_bytes=2000)
    back = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor.bfloat16(), back.state_dict()[name]), name
    with torch.no_grad():
        low = back(ids(ours, 9), ids(ours, 7)).float()
        assert (low - ours(ids(ours, 9), ids(ours, 7))).norm() < 0.1 * low.norm()


def generated_by_transformers(path: Path, prompt: Tensor, tokens: int) -> list[int]:
    # Its own cache has as many layers as the encoder, too few for a deeper decoder.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    options = {"max_new_tokens": tokens, "do_sample": False, "past_key_values": cache}
    return load_hf(path).generate(prompt, **options)[0].tolist()


@each
@torch.no_grad()
def test_greedy_tokens_agree(seed: int, tmp_path: Path) -> None:
    """32 of them: with our cache, without it, and transformers' own."""
    ours = ours_of(seed)
    save_model(ours, tmp_path / "m")
    prompt, start = ids(ours, PROMPT, batch=1), ours.config.decoder_start_token_id
    got = list(generate_tokens(ours, prompt[0].tolist(), SamplingParams(max_tokens=TOKENS, temperature=0)))
    assert [start, *got] == generated_by_transformers(tmp_path / "m", prompt, TOKENS)
    text = [start]
    for _ in range(TOKENS):
        text.append(int(ours(prompt, torch.tensor([text]))[0, -1].argmax()))
    assert text[1:] == got


@each
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_is_its_prompts(seed: int, side: str, tmp_path: Path) -> None:
    ours = ours_of(seed)
    lengths = (PROMPT, 1, 60)
    prompts = [ids(ours, length, 1) for length in lengths]
    answer = ids(ours, 7, len(prompts), seed=5)
    pads = [(PROMPT - n, 0) if side == "left" else (0, PROMPT - n) for n in lengths]
    batch = torch.cat([F.pad(p, pad, value=2) for p, pad in zip(prompts, pads, strict=True)])
    mask = torch.cat([F.pad(torch.ones_like(p), pad) for p, pad in zip(prompts, pads, strict=True)])
    logits = ours(batch, answer, mask)
    for row, prompt in enumerate(prompts):
        close(logits[row], ours(prompt, answer[row : row + 1])[0])
    if side == "right":  # on the left, transformers gives padding the room of full experts
        save_model(ours, tmp_path / "m")
        theirs = load_hf(tmp_path / "m")(batch, attention_mask=mask, decoder_input_ids=answer)
        close(logits, theirs.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_of_padding_alone_is_finite(dtype: torch.dtype) -> None:
    ours = build().to(dtype)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    assert ours(ids(ours, 4), ids(ours, 3), mask).isfinite().all()


@each
def test_loss_and_router_gradients_agree(seed: int, tmp_path: Path) -> None:
    """In training mode: the config that tenfold writes turns dropout and jitter off."""
    ours = ours_of(seed).train()
    save_model(ours, tmp_path / "m")
    theirs, prompt, labels = load_hf(tmp_path / "m").train(), ids(ours, PROMPT), ids(ours, 11, seed=4)
    start = torch.full_like(labels[:, :1], ours.config.decoder_start_token_id)
    logits = ours(prompt, torch.cat((start, labels[:, :-1]), dim=1))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    their_loss = theirs(prompt, labels=labels).loss
    close(loss, their_loss, 1e-5)
    loss.backward()
    their_loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    routers = 0
    for name, slot in family_for(ours.config).tensor_map(ours.config).items():
        if not slot.is_copy:
            gradient = slot.view(ours.get_parameter(slot.name).grad)
            expected = torch.zeros_like(gradient) if wanted[name] is None else wanted[name]
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)
            routers += ".router." in name and float(gradient.abs().max()) > 1e-6
    assert routers or ours.config.num_experts == 1 or not ours.config.num_sparse_layers


@torch.no_grad()
def test_a_full_expert_turns_the_later_tokens_away() -> None:
    ours = build(num_experts=2, encoder_sparse_step=1, expert_capacity=4)
    router = ours.encoder.block[0].mlp.router
    x, real = torch.randn(2, 12, ours.config.d_model), torch.ones(2, 12, dtype=torch.bool)
    real[1, :5] = False
    given, _, aux = router(x, real)
    wanted = aux.expert_ids_TK.view(2, 12).tolist()
    for row in range(2):
        room = [4, 4]
        for place, expert in enumerate(wanted[row]):
            assert (expert == EMPTY_SLOT) == (not real[row, place])
            if expert != EMPTY_SLOT:
                room[expert] -= 1
                if room[expert] < 0:
                    expert = EMPTY_SLOT
            assert given.view(2, 12)[row, place] == expert
    assert int(aux.load_E.sum()) == 19
    assert int(aux.dropped) == (given == EMPTY_SLOT).sum() - 5 > 0


def change_tensors(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight"
BAD_TENSORS = {
    "missing": (lambda t: t.pop(EXPERT), f"{EXPERT} is missing"),
    "misshapen": (lambda t: t.update({EXPERT: torch.zeros(3, 4)}), rf"{EXPERT} has shape \(3, 4\)"),
    "left over": (lambda t: t.update({"decoder.extra": torch.zeros(1)}), "decoder.extra has no place"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_named(edit: Any, message: str, tmp_path: Path) -> None:
    save_model(build(), tmp_path / "m")
    change_tensors(tmp_path / "m", edit)
    with pytest.raises(TenfoldError, match=message):
        load_model(tmp_path / "m")


def test_tensors_that_older_files_repeat_are_passed_over(tmp_path: Path) -> None:
    ours = build(tie_word_embeddings=True)
    save_model(ours, tmp_path / "m")
    extra = (
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    )  # fmt: skip
    change_tensors(tmp_path / "m", lambda t: t.update({name: torch.ones(1) for name in extra}))
    assert torch.equal(load_model(tmp_path / "m").lm_head.weight, ours.lm_head.weight)


def test_what_takes_decoders_only_refuses_the_directory(tmp_path: Path) -> None:
    save_model(build(), tmp_path / "m")
    with pytest.raises(
        TenfoldError, match=r"m is an encoder-decoder \(switch_transformers\); give a decoder-only"
    ):
        load_decoder_only(tmp_path / "m")
