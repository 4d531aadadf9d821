"""Models in GGUF files: the same numbers as the model that was written, and as transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import ARCHITECTURES, expressible, quantise, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity_transformers import build, load_hf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tenfold.checkpoint import load_config, load_model, save_model
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.rope import rope_tables

CONFIGS = [(family, seed) for family in ARCHITECTURES for seed in range(6)]
each = pytest.mark.parametrize(("family", "seed"), CONFIGS, ids=[f"{f}-{s}" for f, s in CONFIGS])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def ids_for(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(3))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@each
@torch.no_grad()
def test_what_was_written_is_loaded_and_saved(family: str, seed: int, tmp_path: Path, file: Path) -> None:
    model = build(expressible(family, seed))
    write_model(file, model, split_kv_b=seed % 2 == 0, fused_experts=seed % 3 == 0)
    loaded = load_model(file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    ids = ids_for(model.config)
    assert torch.equal(loaded(ids), model(ids))
    assert save_model(loaded, tmp_path / "saved").model_type == family
    close(load_hf(tmp_path / "saved")(ids).logits, model(ids))


PLAIN = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.3,
    "qk_norm": "none",
}
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
# Where transformers has no reading for a key, its own default has to do: 128, 1408, 5632, 768.
THEIRS = {
    "llama": PLAIN,
    "llama-tied": {**PLAIN, "tie_word_embeddings": True, "rope_theta": 5e5, "num_key_value_heads": 1},
    "qwen3": {**PLAIN, "head_dim": 128, "qk_norm": "head", "hidden_size": 17},
    "qwen3_moe": {**PLAIN, **FEW, "moe_intermediate_size": 768, "qk_norm": "head"},
    "qwen2_moe": {
        **PLAIN,
        **FEW,
        "norm_topk_prob": False,
        "attention_bias": True,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "shared_expert_gate": True,
    },
}


def load_hf_gguf(file: Path) -> torch.nn.Module:
    """transformers' own reading of a GGUF file; its `from_pretrained` wants accelerate beside that."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    problems = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(problems.missing_keys) <= tied and not problems.unexpected_keys
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_transformers_reads_the_same_model(name: str, file: Path) -> None:
    model = build(THEIRS[name] | {"model_type": name.removesuffix("-tied")})
    write_model(file, model)
    ids = ids_for(model.config)
    close(load_model(file)(ids), load_hf_gguf(file)(ids).logits)


WHOLE_BLOCKS = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT_BLOCKS = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "shared_expert_intermediate_size": 0,
}
QUANTISED = dict(
    zip(
        ARCHITECTURES,
        (
            Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
            Kind.BF16, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.MXFP4,
        ),
        strict=True,
    )
)  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), QUANTISED.items())
@torch.no_grad()
def test_quantised_weights_are_what_the_gguf_package_decodes(family: str, kind: Kind, file: Path) -> None:
    fields = expressible(family, 3)
    blocks = WHOLE_BLOCKS | (LATENT_BLOCKS if family.startswith("deepseek") else {})
    fields |= {name: value for name, value in blocks.items() if fields.get(name)}
    model = build(fields)
    write_model(file, model, kind, split_kv_b=False)
    quantise(model, kind)
    assert torch.equal(load_model(file)(ids_for(model.config)), model(ids_for(model.config)))


def written(file: Path, fields: dict[str, Any], **changes: Any) -> Path:
    write_model(file, build(fields | {"model_type": fields.get("model_type", "llama")}), **changes)
    return file


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 5e5, 128), (32.0, 5e5, 64)])
def test_llama3_settings_come_back_from_the_divisors(
    factor: float, theta: float, head_dim: int, file: Path
) -> None:
    """Those of Llama 3.1 and 3.2."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    fields = PLAIN | {"rope_scaling": scaling, "rope_theta": theta, "head_dim": head_dim}
    assert load_config(written(file, fields)).rope_scaling == ModelConfig(**fields).rope_scaling


@settings(max_examples=40, deadline=None)
@given(
    factor=st.floats(1.5, 64),
    low=st.floats(0.5, 4),
    ratio=st.floats(2, 8),
    context=st.sampled_from([4096, 8192, 32768]),
    theta=st.sampled_from([1e4, 5e5]),
)
def test_llama3_frequencies_are_the_writers(
    factor: float, low: float, ratio: float, context: int, theta: float, tmp_path_factory: Any
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low * ratio,
        "original_max_position_embeddings": context,
    }
    fields = PLAIN | {"rope_scaling": scaling, "rope_theta": theta, "head_dim": 128, "num_hidden_layers": 1}
    file = written(tmp_path_factory.mktemp("llama3") / "m.gguf", fields)
    read, positions = load_config(file), torch.tensor([1, 100])
    for table, wanted in zip(
        rope_tables(read, positions), rope_tables(ModelConfig(**fields), positions), strict=True
    ):
        close(table, wanted, 1e-3)


def test_divisors_of_another_rule_are_refused(file: Path) -> None:
    for divisors in ([1.0, 1.0, 0.0], [3.0, 1.0, 2.0], [np.nan] * 3, [1.0, -2.0, np.inf]):
        written(file, PLAIN, tensors={"rope_freqs.weight": np.array(divisors, np.float32)})
        with pytest.raises(TenfoldError, match=r"m.gguf: tensor rope_freqs.weight does not hold the"):
            load_model(file)
    written(file, PLAIN, tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(TenfoldError, match=r"rope_freqs.weight has shape \(4,\), not \(3,\)"):
        load_model(file)
    written(file, PLAIN, tensors={"rope_freqs.weight": np.ones(3, np.float32)})
    assert load_config(file).rope_scaling is None


def test_what_a_file_leaves_out(file: Path) -> None:
    """Values that llama.cpp takes for keys that are not there."""
    missing = (
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
    )
    fields = PLAIN | {"num_key_value_heads": 4}
    config = load_config(written(file, fields, metadata={f"llama.{name}": None for name in missing}))
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 6, 10000.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


@pytest.mark.parametrize(
    ("family", "renormalised"),
    [("olmoe", False), ("qwen2_moe", False), ("qwen3_moe", True), ("deepseek_v2", False)],
)
def test_whether_chosen_experts_are_renormalised_where_nothing_is_said(
    family: str, renormalised: bool, file: Path
) -> None:
    key = f"{ARCHITECTURES[family]}.expert_weights_norm"
    assert (
        load_config(written(file, expressible(family, 2), metadata={key: None})).norm_topk_prob
        is renormalised
    )


def test_one_value_for_every_layer_may_be_listed(file: Path) -> None:
    key = "llama.feed_forward_length"
    assert load_config(written(file, PLAIN, metadata={key: [20, 20]})).intermediate_size == 20
    written(file, PLAIN, metadata={key: [20, 21]})
    with pytest.raises(TenfoldError, match=rf"{key} \[20, 21\] is not supported, only one value"):
        load_config(file)


def test_special_tokens(file: Path) -> None:
    """The end of a text and of a turn both end; ids outside the vocabulary name nothing."""
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 2, "padding": 61}
    metadata = {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()}
    config = load_config(written(file, PLAIN, metadata=metadata))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, (2, 5), None)


def test_linear_scaling_under_its_older_name(file: Path) -> None:
    scaling = load_config(written(file, PLAIN, metadata={"llama.rope.scale_linear": 2.5})).rope_scaling
    assert scaling is not None and (scaling.rope_type, scaling.factor) == ("linear", 2.5)


def test_float32_settings_are_the_decimals_they_came_from(file: Path) -> None:
    assert load_config(written(file, PLAIN | {"rms_norm_eps": 1e-5})).rms_norm_eps == 1e-5


BAD_METADATA = {
    "architecture": (
        {"general.architecture": "lama"},
        r"unknown general.architecture 'lama' \(did you mean llama",
    ),
    "no architecture": ({"general.architecture": None}, "unknown general.architecture None; known: llama,"),
    "missing": ({"llama.embedding_length": None}, "key llama.embedding_length is missing"),
    "no layers": ({"llama.block_count": 0}, "num_hidden_layers: "),
    "many layers": ({"llama.block_count": 2**31}, "llama.block_count 2147483648 is not supported"),
    "no heads": ({"llama.attention.head_count": 0}, "num_attention_heads: "),
    "text": ({"llama.embedding_length": "wide"}, "llama.embedding_length 'wide' is not supported"),
    "true": ({"llama.embedding_length": True}, "llama.embedding_length True is not supported"),
    "below zero": ({"llama.context_length": -1}, "llama.context_length -1 is not supported"),
    "nan": ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base nan is not supported"),
    "infinite": ({"llama.rope.freq_base": float("inf")}, "llama.rope.freq_base inf is not supported"),
    "wider": ({"llama.embedding_length": 25}, "m.gguf: tensor token_embd.weight has shape"),
    "huge": ({"llama.feed_forward_length": 2**31 - 1}, "m.gguf: tensor blk.0.ffn_gate.weight has shape"),
    "key and value": ({"llama.attention.value_length": 5}, "llama.attention.value_length 5 .* only 6"),
    "partial rope": ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count 4 .* only 6"),
    "scaling": (
        {"llama.rope.scaling.type": "longrope"},
        "scaling.type 'longrope' is not supported, only none",
    ),
    "two ways": ({"llama.attention.causal": False}, "llama.attention.causal False .* only True"),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor 1.5 .* only 1.0"),
    "yarn": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        "key llama.rope.scaling.original_context_length is missing",
    ),
    "gate": (
        {"llama.expert_count": 4, "llama.expert_gating_func": 2},
        "llama.expert_gating_func 2 is not supported, only 0 or 1",
    ),
    "dense with experts": ({"llama.expert_count": 4}, "key llama.expert_used_count is missing"),
}


@pytest.mark.parametrize(("metadata", "message"), BAD_METADATA.values(), ids=BAD_METADATA)
def test_bad_metadata(metadata: dict[str, Any], message: str, file: Path) -> None:
    written(file, PLAIN, metadata=metadata)
    with pytest.raises(TenfoldError, match=message) as caught:
        load_model(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


NORM = "blk.1.attn_norm.weight"
BAD_TENSORS = {
    "missing": ({NORM: None}, f"tensor {NORM} is missing, which the llama of .*m.gguf calls for"),
    "no embedding": ({"token_embd.weight": None}, "tensor token_embd.weight is missing"),
    "left over": ({"blk.2.more.weight": np.ones(2, np.float32)}, "tensor blk.2.more.weight has no place in"),
    "misshapen": ({NORM: np.ones(23, np.float32)}, rf"tensor {NORM} has shape \(23,\), not \(24,\)"),
    "undecodable": ({NORM: np.ones(24)}, f"tensor {NORM} is F64, which cannot be decoded"),
    "whole numbers": ({NORM: np.ones(24, np.int32)}, f"tensor {NORM} is I32, which cannot be decoded"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors(tensors: dict[str, Any], message: str, file: Path) -> None:
    written(file, PLAIN, tensors=tensors)
    with pytest.raises(TenfoldError, match=message) as caught:
        load_model(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
def test_a_split_model_is_loaded_from_any_of_its_parts(tmp_path: Path) -> None:
    model = build(PLAIN | {"model_type": "llama"})
    write_model(tmp_path / "m.gguf", model, split_max_tensors=7)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert torch.equal(load_model(part)(ids_for(model.config)), model(ids_for(model.config)))
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(TenfoldError, match=rf"{parts[1]}: it does not say that it is part 2 of {len(parts)}"):
        load_model(parts[0])
    parts[1].unlink()
    with pytest.raises(TenfoldError, match=rf"{parts[1]}: no such file, and {parts[0].name} is a part of"):
        load_model(parts[0])
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(TenfoldError, match=r"it must be called NAME-00001-of-0000N\.gguf"):
        load_model(tmp_path / "renamed.gguf")
