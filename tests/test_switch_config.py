"""SwitchConfig: counts against built models, published totals, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.checkpoint import load_config
from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.families.switch import from_hf
from tenfold.cli import main
from tenfold.errors import TenfoldError
from tenfold.model.switch import SwitchTransformer
from tenfold.presets import load_preset
from tenfold.switch_config import SwitchConfig


@st.composite
def configs(draw: st.DrawFn) -> SwitchConfig:
    return SwitchConfig(
        vocab_size=draw(st.integers(1, 50)),
        d_model=draw(st.integers(1, 30)),
        d_kv=draw(st.integers(1, 9)),
        d_ff=draw(st.integers(1, 30)),
        num_layers=draw(st.integers(1, 5)),
        num_decoder_layers=draw(st.integers(1, 5)),
        num_heads=draw(st.integers(1, 4)),
        num_experts=draw(st.integers(1, 6)),
        expert_capacity=draw(st.integers(1, 99)),
        encoder_sparse_step=draw(st.integers(0, 5)),
        decoder_sparse_step=draw(st.integers(0, 5)),
        router_bias=draw(st.booleans()),
        relative_attention_num_buckets=draw(st.integers(4, 40)),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=60, deadline=None)
@given(configs())
def test_counts_are_those_of_the_built_model(config: SwitchConfig) -> None:
    with torch.device("meta"):
        model = SwitchTransformer(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts = config.params()
    assert config.num_params() == sum(sizes.values())

    def having(part: str) -> int:
        return sum(size for name, size in sizes.items() if part in name)

    assert counts.experts == having(".experts.")
    idle = counts.experts - counts.experts // config.num_experts
    assert config.num_active_params() == config.num_params() - idle
    assert (counts.embedding, counts.lm_head) == (having("embed_tokens"), having("lm_head"))
    assert (counts.norms, counts.router) == (having("norm"), having(".router."))
    assert counts.attention == having("_attn.") + having("relative_attention_bias")

    cross_keys = having("cross_attn.k.") + having("cross_attn.v.")
    decoder = {name: size for name, size in sizes.items() if name.startswith("decoder.block")}
    experts = sum(size for name, size in decoder.items() if ".experts." in name)
    head = config.vocab_size * config.d_model
    used = sum(decoder.values()) - experts + experts // config.num_experts - cross_keys + head
    added = sum(size for name, size in decoder.items() if "norm" in name or name.endswith("router.bias"))
    assert config.flops_per_token(0) == 2 * (used - added)
    seen = 2 * config.num_heads * config.d_kv * config.num_decoder_layers
    assert config.flops_per_token(10) - config.flops_per_token(0) == 2 * 10 * seen
    assert config.kv_bytes_per_token("bfloat16") == 2 * seen
    rest = config.d_model + sizes["decoder.relative_attention_bias.weight"]
    row = 0 if config.tie_word_embeddings else config.d_model
    assert config.weights_per_token() == used + rest + row


SMALL = {
    "model_type": "switch_transformers", "vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8,
    "num_layers": 2, "num_heads": 2, "num_experts": 2, "expert_capacity": 4,
    "encoder_sparse_step": 1, "decoder_sparse_step": 1,
}  # fmt: skip
BAD_CONFIGS = {
    "gated": ({"dense_act_fn": "gated-gelu"}, "dense_act_fn 'gated-gelu' is not supported, only 'relu'"),
    "gated, old name": ({"feed_forward_proj": "gated-gelu"}, "feed_forward_proj 'gated-gelu'"),
    "half router": ({"router_dtype": "bfloat16"}, "router_dtype 'bfloat16'"),
    "no decoder": ({"is_encoder_decoder": False}, "is_encoder_decoder False"),
    "missing": ({"d_kv": None}, "field d_kv is missing"),
    "no steps": (
        {"encoder_sparse_step": None},
        "encoder_sparse_step or num_sparse_encoder_layers is missing",
    ),
    "wrong count": (
        {"encoder_sparse_step": None, "num_sparse_encoder_layers": "two"},
        "num_sparse_encoder_layers 'two' is not supported",
    ),
    "no experts": ({"num_experts": 0}, "num_experts: .*not 0"),
    "no room": ({"expert_capacity": 0}, "expert_capacity: .*not 0"),
    "few buckets": ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets: .*not 3"),
    "short distance": (
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 16},
        "relative_attention_max_distance 16 must be more than half of relative_attention_num_buckets 32",
    ),
    "odd start": ({"decoder_start_token_id": 9}, "decoder_start_token_id 9 must be less than vocab_size 9"),
    "not a number": ({"d_model": "wide"}, "d_model: .*not 'wide'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configs_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | fields))
    with pytest.raises(TenfoldError, match=message) as caught:
        load_config(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)


def test_the_small_config_is_good(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    config = load_config(tmp_path)
    assert (config.num_decoder_layers, config.eos_token_ids, config.decoder_start_token_id) == (2, (1,), 0)


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_what_takes_decoders_only_says_so(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["tenfold", verb, "--preset", "switch-base-8", "--out", str(tmp_path / "o")]
    )
    with pytest.raises(SystemExit):
        main()
    assert "preset switch-base-8 is an encoder-decoder" in capsys.readouterr().err


def test_the_preset_is_saved_as_it_was_published() -> None:
    config = load_preset("switch-base-8")
    assert from_hf(family_for(config).to_hf(config), "x") == config
