"""ModelConfig: counts against built models, dense twins, and its errors."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from random_families import FAMILIES, random_fields

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer
from tenfold.presets import load_preset

SPARSE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    fields: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 50)),
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 6)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
    }
    experts = draw(st.integers(0, 6))
    if experts:
        router = draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid", "switch"]))
        fields |= {
            "num_experts": experts,
            "num_experts_per_tok": 1 if router == "switch" else draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(st.integers(1, 20)),
            "n_shared_experts": draw(st.integers(0, 2)),
            "decoder_sparse_step": draw(st.integers(1, 3)),
            "mlp_only_layers": tuple(draw(st.sets(st.integers(0, layers - 1)))),
            "router": router,
        }
    return ModelConfig(**fields)


FAMILY_CONFIGS = [ModelConfig(**random_fields(family, seed)) for family in FAMILIES for seed in range(6)]


@settings(max_examples=150, deadline=None)
@given(configs() | st.sampled_from(FAMILY_CONFIGS))
def test_counts_are_those_of_the_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert config.mtp_params() == sum(tensor.numel() for tensor in model.mtp.state_dict().values())
    model.mtp = torch.nn.ModuleList()
    tensors = [*model.parameters(), *model.buffers()]
    assert config.num_params() == sum(tensor.numel() for tensor in tensors)

    experts = sum(t.numel() for name, t in model.named_parameters() if ".experts." in name)
    used = experts // config.num_experts * config.num_experts_per_tok if experts else 0
    assert config.num_active_params() == config.num_params() - experts + used

    counts = config.params()
    stacks = sum(t.numel() for name, t in model.named_parameters() if ".experts." in name and t.ndim == 3)
    assert counts.experts == stacks
    assert counts.embedding == model.embed_tokens.weight.numel()
    norms = sum(t.numel() for name, t in model.named_parameters() if "norm" in name)
    assert counts.norms == norms
    routers = sum(t.numel() for name, t in model.state_dict().items() if ".router." in name)
    assert counts.router == routers


@settings(max_examples=100, deadline=None)
@given(configs() | st.sampled_from(FAMILY_CONFIGS))
def test_flops_count_every_multiplied_weight(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    model.mtp = torch.nn.ModuleList()
    weights = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim == 3:
            weights += parameter[0].numel() * config.num_experts_per_tok
        elif parameter.ndim == 2 and name != "embed_tokens.weight" and not name.endswith("bias"):
            weights += parameter.numel()
    assert config.flops_per_token(0) == 2 * weights
    key = config.qk_nope_head_dim + config.head_dim
    width = 2 * config.num_attention_heads * (key + (config.v_head_dim or config.head_dim))
    attended = sum(min(10, config.window(n) or 10) for n in range(config.num_hidden_layers))
    assert config.flops_per_token(10) - config.flops_per_token(0) == width * attended


@pytest.mark.parametrize("equal", ["active", "total"])
@pytest.mark.parametrize("name", ["olmoe-1b-7b", "deepseek-v2-lite", "small"])
def test_dense_twin_is_dense_and_of_equal_size(name: str, equal: Any) -> None:
    sparse = ModelConfig(**SPARSE) if name == "small" else load_preset(name)
    twin = sparse.dense_twin(equal)
    wanted = sparse.num_active_params() if equal == "active" else sparse.num_params()
    assert not twin.is_sparse
    assert twin.num_params() == pytest.approx(wanted, rel=0.02)
    assert (twin.hidden_size, twin.num_hidden_layers) == (
        sparse.hidden_size,
        sparse.num_hidden_layers,
    )


def test_dense_twin_that_cannot_be_is_an_error() -> None:
    narrow = {**SPARSE, "moe_intermediate_size": 1, "num_experts_per_tok": 1}
    shape = {"hidden_size": 512, "vocab_size": 1, "num_attention_heads": 1, "head_dim": 2}
    config = ModelConfig(**{**narrow, **shape, "num_key_value_heads": 1, "num_experts": 2})
    with pytest.raises(TenfoldError, match="no dense model of this shape"):
        config.dense_twin("active")


CONTRADICTIONS = {
    "kv heads": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple of"),
    "odd rotary": ({"head_dim": 7}, "even number"),
    "no rotary": ({"partial_rotary_factor": 0.01}, "even number"),
    "no mlp": ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
    "top-k of none": ({"num_experts_per_tok": 2}, "num_experts is 0"),
    "top-k above E": ({**SPARSE, "num_experts_per_tok": 9}, "from 1 to num_experts 8"),
    "top-k zero": ({**SPARSE, "num_experts_per_tok": 0}, "from 1 to num_experts 8"),
    "no width": ({**SPARSE, "moe_intermediate_size": 0}, "moe_intermediate_size must be"),
    "absent layer": ({**SPARSE, "mlp_only_layers": (4,)}, "a layer that is not there"),
    "switch top-2": ({**SPARSE, "router": "switch"}, "must be 1, not 2"),
    "softmax groups": ({**SPARSE, "router": "topk_softmax", "n_group": 2}, "need router sigmoid or softmax"),
    "uneven groups": ({**SPARSE, "router": "sigmoid", "n_group": 3}, "groups of 2 or more"),
    "too many groups": (
        {**SPARSE, "router": "sigmoid", "n_group": 2, "topk_group": 3},
        "more than n_group 2",
    ),
    "groups too small": (
        {**SPARSE, "router": "sigmoid", "n_group": 4, "num_experts_per_tok": 3},
        "fewer than num_experts_per_tok 3",
    ),
    "negative": ({"hidden_size": -1}, "hidden_size: .*greater than 0, not -1"),
    "wrong type": ({"vocab_size": "many"}, "vocab_size: .*not 'many'"),
    "unknown router": ({"router": "sofmax"}, "router: .*'softmax'"),
    "misspelt": ({"hiden_size": 8}, r"unknown field hiden_size \(did you mean hidden_size\?\)"),
}


@pytest.mark.parametrize(("fields", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TenfoldError, match=message) as caught:
        ModelConfig.parse(fields, "my.toml")
    assert str(caught.value).startswith("my.toml: ")
    assert "\n" not in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ModelConfig().hidden_size = 3  # type: ignore[misc]
