"""Whatever config.json holds: a config or a TenfoldError, soon and in little memory."""

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_families import FAMILIES, random_fields

from tenfold.checkpoint import read_config
from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.families.switch import SWITCH
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.switch_config import SwitchConfig

fuzz = settings(
    max_examples=300,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TINY_SWITCH = SwitchConfig(
    vocab_size=40, d_model=8, d_kv=4, d_ff=6, num_layers=2, num_decoder_layers=2, num_heads=2,
    num_experts=3, expert_capacity=4, encoder_sparse_step=2, decoder_sparse_step=2,
)  # fmt: skip


def valid(family: str) -> dict[str, Any]:
    if family == "switch_transformers":
        return SWITCH.to_hf(TINY_SWITCH)
    config = ModelConfig(**random_fields(family, 3))
    return family_for(config).to_hf(config)


VALID = {family: valid(family) for family in (*FAMILIES, "switch_transformers")}
OPTIONAL = (
    "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "rope_scaling",
    "rope_parameters", "quantization_config", "mlp_only_layers", "first_k_dense_replace", "head_dim",
    "num_sparse_encoder_layers", "topk_method", "n_group", "architectures",
)  # fmt: skip

numbers = st.sampled_from(
    [0, 1, -1, 2, 7, 1000, 2**31, 2**63, 10**30, 10**400, 0.5, float("inf"), float("nan")]
)
simple = st.none() | st.booleans() | numbers | st.text(max_size=4)
ropes = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "default"]) | simple},
    optional=dict.fromkeys(("factor", "original_max_position_embeddings", "rope_theta", "mscale"), simple),
)
quantizations = st.fixed_dictionaries(
    {"quant_method": st.sampled_from(["fp8", "mxfp4"]) | simple},
    optional={"weight_block_size": st.lists(simple, max_size=3) | simple},
)
values = (
    simple
    | ropes
    | quantizations
    | st.lists(simple | st.sampled_from(["sliding_attention", "full_attention"]), max_size=4)
    | st.dictionaries(st.text(max_size=3), simple, max_size=2)
)


def check(path: Path, text: str) -> None:
    path.write_text(text)
    tracemalloc.start()
    try:
        _, config = read_config(path)
        assert config.num_params() > 0
    except TenfoldError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < 2000
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@fuzz
@given(data=st.data(), family=st.sampled_from(list(VALID)))
def test_valid_configs_with_some_fields_changed(tmp_path: Path, data: st.DataObject, family: str) -> None:
    raw = copy.deepcopy(VALID[family])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([*raw, *OPTIONAL]))
        if data.draw(st.integers(0, 5)):
            raw[name] = data.draw(values)
        else:
            raw.pop(name, None)
    check(tmp_path / "config.json", json.dumps(raw))


@fuzz
@given(
    raw=st.dictionaries(
        st.sampled_from(["architectures", "model_type", "vocab_size", "num_hidden_layers"]) | st.text(),
        values | st.sampled_from([[raw["architectures"][0]] for raw in VALID.values()]),
        max_size=5,
    )
)
def test_arbitrary_objects(tmp_path: Path, raw: dict[str, Any]) -> None:
    check(tmp_path / "config.json", json.dumps(raw))


@fuzz
@given(contents=st.binary(max_size=40))
def test_arbitrary_bytes(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(TenfoldError):
        read_config(tmp_path / "config.json")


INF = float("inf")
FOUND = {
    "layers": ("qwen3", {"num_hidden_layers": 10**30}, "num_hidden_layers: .* less than or equal to 1000"),
    "sliding layers": (
        "gpt_oss",
        {"num_hidden_layers": 10**9, "layer_types": None},
        "num_hidden_layers 10+ is not supported, only up to 1,000",
    ),
    "experts": ("qwen3_moe", {"num_experts": 10**9}, "num_experts 10+ in . layers is more than any"),
    "Switch's layers": ("switch_transformers", {"num_layers": 10**9}, "num_layers: .* less than or equal"),
    "Switch's experts": ("switch_transformers", {"num_experts": 10**9}, "num_experts 10+ in . layers is"),
    "wider than floats": ("llama", {"head_dim": 10**400}, "head_dim 10+ is larger than any"),
    "infinite": ("llama", {"rms_norm_eps": INF}, "rms_norm_eps: Input should be a finite number"),
    "number of types": ("gpt_oss", {"layer_types": 3}, "layer_types 3 is not supported, only a list"),
    "text of layers": ("deepseek_v3", {"first_k_dense_replace": "x"}, "'x' is not supported, only a whole"),
    "half a layer": ("deepseek_v3", {"first_k_dense_replace": 0.5}, "0.5 is not supported, only a whole"),
    "endless name": ("llama", {"architectures": ["x" * 10**6]}, "unknown architectures"),
}
"""By fuzzing: what hung, filled the memory, or ended in another error."""


@pytest.mark.parametrize(("family", "fields", "message"), FOUND.values(), ids=FOUND)
def test_what_was_found(tmp_path: Path, family: str, fields: dict[str, Any], message: str) -> None:
    check(tmp_path / "config.json", json.dumps(VALID[family] | fields))
    with pytest.raises(TenfoldError, match=message):
        read_config(tmp_path / "config.json")


def test_deep_nesting(tmp_path: Path) -> None:
    check(tmp_path / "config.json", "[" * 100_000)
