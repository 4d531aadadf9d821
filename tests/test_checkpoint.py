"""Model directories: exact round trips, sharding, tokenizers, and every kind of bad input."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from tenfold.checkpoint import load_config, load_model, safetensors, save_model
from tenfold.checkpoint.families import family_for, why_native
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer
from tenfold.tokenizer import Tokenizer, load_tokenizer

CONFIG = ModelConfig(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=7,
    n_shared_experts=1,
    router="sigmoid",
    mlp_only_layers=(0,),
    eos_token_id=0,
)


def build(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config).init_weights(0).eval()
    for name, buffer in model.named_buffers():
        assert name.endswith("router.bias")
        buffer.copy_(torch.arange(buffer.numel()) / 3)  # not exact in bf16
    return model


def assert_same(left: Transformer, right: Transformer) -> None:
    theirs = right.state_dict()
    assert left.state_dict().keys() == theirs.keys()
    for name, tensor in left.state_dict().items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(build(), tmp_path / "m")
    return tmp_path / "m"


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("shard_bytes", [10**9, 3000, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(tmp_path: Path, shard_bytes: int, tied: bool) -> None:
    model = build(CONFIG.model_copy(update={"tie_word_embeddings": tied}))
    save_model(model, tmp_path / "m", max_shard_bytes=shard_bytes)
    back = load_model(tmp_path / "m")
    assert_same(model, back)
    assert (back.lm_head.weight is back.embed_tokens.weight) == tied
    assert not back.training


def test_shards_keep_to_the_limit_and_the_index_adds_up(tmp_path: Path) -> None:
    save_model(build(), tmp_path / "m", max_shard_bytes=3000)
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(shards) > 1
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 3000 for shard in shards)


def test_bf16_on_disk_and_in_memory_with_float32_router_bias(tmp_path: Path) -> None:
    model = build()
    save_model(model, tmp_path / "m", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    bias = tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert torch.equal(bias, model.layers[1].mlp.router.bias)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"

    back = load_model(tmp_path / "m", dtype=torch.bfloat16)
    wanted = build()
    for parameter in wanted.parameters():
        parameter.data = parameter.data.bfloat16()
    assert_same(wanted, back)
    save_model(back, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_loading_as_no_float_is_refused(saved: Path) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(TenfoldError, match=f"cannot load as {dtype}, only torch.float32, "):
            load_model(saved, dtype)


def test_redundant_tensors_of_published_checkpoints_are_passed_over(tmp_path: Path) -> None:
    model = build(CONFIG.model_copy(update={"tie_word_embeddings": True}))
    save_model(model, tmp_path / "m")
    extra = {"lm_head.weight", "model.layers.2.eh_proj.weight", "model.rotary_emb.inv_freq"}
    change_tensors(tmp_path / "m", lambda t: t.update({name: torch.ones(1) for name in extra}))
    assert_same(model, load_model(tmp_path / "m"))


def word_tokenizer(words: int = 31) -> Tokenizer:
    vocab = {"<|end|>": 0, **{f"w{i}": i for i in range(1, words)}}
    raw = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(raw)


def test_auto_tokenizer_loads_what_was_saved(tmp_path: Path) -> None:
    save_model(build(), tmp_path / "m", word_tokenizer())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert theirs("w5 w9 w30")["input_ids"] == [5, 9, 30]
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|end|>", 0)
    assert load_tokenizer(tmp_path / "m").encode("w5 w9 w30") == [5, 9, 30]


@pytest.mark.parametrize(
    ("words", "eos", "message"),
    [(32, 0, "32 tokens, more than"), (20, 25, "no token of eos_token_id 25")],
)
def test_tokenizer_that_does_not_fit(tmp_path: Path, words: int, eos: int, message: str) -> None:
    model = build(CONFIG.model_copy(update={"eos_token_id": eos}))
    with pytest.raises(TenfoldError, match=message):
        save_model(model, tmp_path / "m", word_tokenizer(words))
    assert list(tmp_path.iterdir()) == []


GATE = "model.layers.0.mlp.gate_proj.weight"


def _truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 5000)


def _garble(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!")


def _wrong_shape(directory: Path) -> None:
    change_tensors(directory, lambda t: t.update({GATE: torch.zeros(3, 3)}))


BAD_WEIGHTS = {
    "truncated": (_truncate, "model.safetensors: not a whole safetensors file"),
    "garbled": (_garble, "model.safetensors: not a whole safetensors file"),
    "empty": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        "model.safetensors: not a whole safetensors file",
    ),
    "absent": (lambda d: (d / "model.safetensors").unlink(), "no weights there; expected model"),
    "missing": (
        lambda d: change_tensors(d, lambda t: t.pop(GATE)),
        f"tensor {GATE} is missing",
    ),
    "extra": (
        lambda d: change_tensors(d, lambda t: t.update({"more": torch.ones(2)})),
        "model.safetensors: tensor more has no place in the Glm4MoeForCausalLM of .*config.json",
    ),
    "shape": (
        _wrong_shape,
        rf"model.safetensors: tensor {GATE} has shape \(3, 3\), not \(10, 12\)",
    ),
    "transposed": (
        lambda d: change_tensors(d, lambda t: t.update({GATE: t[GATE].T.contiguous()})),
        rf"tensor {GATE} has shape \(12, 10\), not \(10, 12\)",
    ),
    "integers": (
        lambda d: change_tensors(d, lambda t: t.update({GATE: t[GATE].to(torch.int8)})),
        f"model.safetensors: tensor {GATE} is int8, not float32, bfloat16, float16",
    ),
    "float8": (
        lambda d: change_tensors(d, lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
        f"tensor {GATE} is float8_e4m3fn",
    ),
}


@pytest.mark.parametrize(("harm", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights(saved: Path, harm: Any, message: str) -> None:
    harm(saved)
    with pytest.raises(TenfoldError, match=message) as caught:
        load_model(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def _swap_in_index(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    weights = json.loads(path.read_text())["weight_map"]
    first, last = min(weights.values()), max(weights.values())
    change(path, weight_map={n: first if f == last else f for n, f in weights.items()})


def _outside(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    weights = json.loads(path.read_text())["weight_map"]
    change(path, weight_map={**weights, GATE: "../model-00001-of-00002.safetensors"})


BAD_INDEX = {
    "shard gone": (
        lambda d: max(d.glob("model-*.safetensors")).unlink(),
        r"index.json: tensor .* is in model-.*, which is not there",
    ),
    "wrong shard": (
        _swap_in_index,
        r"model-00001-of-\d+.safetensors: tensor .* is missing, though",
    ),
    "outside": (_outside, "must name a file beside it"),
    "no file's name": (
        lambda d: change(d / "model.safetensors.index.json", weight_map={GATE: "x" * 5000}),
        "which is not there",
    ),
    "no tensor's name": (
        lambda d: change(d / "model.safetensors.index.json", weight_map={"a\n": "x"}),
        "weight_map must map",
    ),
    "no map": (
        lambda d: change(d / "model.safetensors.index.json", weight_map=None),
        "weight_map must map",
    ),
    "not json": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "index.json: not readable as JSON",
    ),
}


@pytest.mark.parametrize(("harm", "message"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_bad_index(tmp_path: Path, harm: Any, message: str) -> None:
    save_model(build(), tmp_path / "m", max_shard_bytes=3000)
    harm(tmp_path / "m")
    with pytest.raises(TenfoldError, match=message):
        load_model(tmp_path / "m")


REFUSED = {
    "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
    "rope_scaling": {"rope_type": "longrope", "factor": 4.0},
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "first_k_dense_replace": "one",
    "num_attention_heads": 0,
}
REFUSED_QWEN = {
    "partial_rotary_factor": 0.5,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
}
REFUSED_OLMOE = {"clip_qkv": 8.0, "sliding_window": 64, "head_dim": 3}
SOFTMAX = CONFIG.model_copy(update={"router": "softmax", "n_shared_experts": 0, "mlp_only_layers": ()})
BASES = [
    (CONFIG, REFUSED),
    (SOFTMAX, REFUSED_QWEN),
    (SOFTMAX.model_copy(update={"qk_norm": "full"}), REFUSED_OLMOE),
]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [(config, name, value) for config, refused in BASES for name, value in refused.items()],
)
def test_what_the_model_does_not_have_is_refused(config: ModelConfig, name: str, value: Any) -> None:
    family = family_for(config)
    raw = family.to_hf(config)
    assert family.from_hf(raw, "config.json").num_params() == config.num_params()
    with pytest.raises(TenfoldError, match=f"^config.json: {name} .* is not supported, only"):
        family.from_hf({**raw, name: value}, "config.json")


def test_a_list_of_end_tokens_is_kept() -> None:
    raw = {**family_for(CONFIG).to_hf(CONFIG), "eos_token_id": [5, 6]}
    config = family_for(CONFIG).from_hf(raw, "x")
    assert config.eos_token_ids == (5, 6)
    assert json.loads(json.dumps(family_for(config).to_hf(config)))["eos_token_id"] == [5, 6]


BAD_CONFIG = {
    "architecture": ({"architectures": ["Qwen3ForCausal"]}, "did you mean Qwen3ForCausalLM"),
    "model type": (
        {"architectures": None, "model_type": "glm4_mo"},
        "unknown model_type glm4_mo .*glm4_moe.*known: qwen3, ",
    ),
    "missing": ({"vocab_size": None}, "field vocab_size is missing"),
    "wrong type": ({"hidden_size": "wide"}, "hidden_size 'wide' is not supported"),
    "contradiction": ({"num_experts_per_tok": 4}, "num_experts_per_tok 4 must be from 1"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIG.values(), ids=BAD_CONFIG)
def test_bad_config(saved: Path, fields: dict[str, Any], message: str) -> None:
    change(saved / "config.json", **fields)
    with pytest.raises(TenfoldError, match=f"config.json: .*{message}"):
        load_config(saved)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "no such file"),
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object, not list"),
    ],
)
def test_unreadable_config(saved: Path, contents: str | None, message: str) -> None:
    (saved / "config.json").unlink()
    if contents is not None:
        (saved / "config.json").write_text(contents)
    with pytest.raises(TenfoldError, match=f"config.json: {message}"):
        load_model(saved)


def test_a_directory_with_something_in_it_is_left_alone(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(TenfoldError, match="is not an empty directory"):
        save_model(build(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    (saved.parent / "empty").mkdir()
    save_model(build(), saved.parent / "empty")
    assert (saved.parent / "empty" / "config.json").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError()])
def test_a_save_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail_midway(path: Path, entries: list[Any]) -> None:
        path.write_bytes(b"begun")
        raise error

    monkeypatch.setattr(safetensors, "_write_file", fail_midway)
    expected = TenfoldError if isinstance(error, OSError) else KeyError
    with pytest.raises(expected) as caught:
        save_model(build(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    if expected is TenfoldError:
        assert str(caught.value).startswith(f"{tmp_path / 'm'}: no space left")


def test_a_named_family_is_kept_only_where_it_fits() -> None:
    dense = ModelConfig()
    assert family_for(dense).model_type == "qwen3"
    assert family_for(dense.model_copy(update={"model_type": "tenfold"})).model_type == "tenfold"
    assert family_for(SOFTMAX.model_copy(update={"model_type": "qwen3"})).model_type == "qwen3_moe"
    with pytest.raises(TenfoldError, match=r"unknown model_type qwen4 .*did you mean qwen3"):
        family_for(dense.model_copy(update={"model_type": "qwen4"}))


def test_why_native_names_the_field() -> None:
    choice = SOFTMAX.model_copy(update={"router": "expert_choice"})
    assert why_native(choice) == "router expert_choice"
    scaled = SOFTMAX.model_copy(update={"routed_scaling_factor": 2.0})
    assert why_native(scaled) == "routed_scaling_factor 2.0"
    both = choice.model_copy(update={"attention_bias": True})
    assert why_native(both) == "this combination of options"
    kinds = ("full_attention", "sliding_attention", "full_attention")  # as many as layers, not the usual four
    slides = SOFTMAX.model_copy(update={"num_hidden_layers": 3, "sliding_window": 2, "layer_types": kinds})
    assert why_native(slides) == f"layer_types {kinds}"


def test_configs_and_presets_need_no_torch() -> None:
    code = (
        "import sys, tenfold.checkpoint.families, tenfold.presets as p"
        "; p.load_preset('olmoe-1b-7b'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
