"""tenfold and transformers compute the same function from the same files, both ways."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from tenfold.checkpoint import load_config, load_model, save_model
from tenfold.checkpoint.families import NATIVE, family_for, family_of
from tenfold.config import ModelConfig
from tenfold.model.transformer import Transformer

DENSE = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
SPARSE = {**DENSE, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9}
GLM = {**SPARSE, "router": "sigmoid", "n_shared_experts": 1}
OLMOE = {**SPARSE, "qk_norm": "full"}

CASES = {
    "qwen3": ("qwen3", DENSE),
    "qwen3-tied-odd": (
        "qwen3",
        {
            **DENSE,
            "tie_word_embeddings": True,
            "hidden_size": 17,
            "head_dim": 10,
            "rope_theta": 5e5,
        },
    ),
    "qwen3-all-mlp-only": ("qwen3", {**SPARSE, "mlp_only_layers": (0, 1)}),
    "qwen3moe": ("qwen3_moe", SPARSE),
    "qwen3moe-top1-raw": (
        "qwen3_moe",
        {**SPARSE, "num_experts_per_tok": 1, "norm_topk_prob": False, "rms_norm_eps": 1e-2},
    ),
    "qwen3moe-all-experts": ("qwen3_moe", {**SPARSE, "num_experts_per_tok": 5}),
    "qwen3moe-raw-weights": ("qwen3_moe", {**SPARSE, "norm_topk_prob": False}),
    "qwen3moe-sparse-step": (
        "qwen3_moe",
        {**SPARSE, "num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": (3,)},
    ),
    "qwen3moe-topk-softmax": (
        "qwen3_moe",
        {**SPARSE, "router": "topk_softmax", "norm_topk_prob": False},
    ),
    "qwen3moe-tied": ("qwen3_moe", {**SPARSE, "tie_word_embeddings": True}),
    "qwen3moe-aligned": (
        "qwen3_moe",
        {**SPARSE, "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 0},
    ),
    "olmoe": ("olmoe", OLMOE),
    "olmoe-raw-tied": ("olmoe", {**OLMOE, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "olmoe-all-experts": ("olmoe", {**OLMOE, "num_experts_per_tok": 5, "num_key_value_heads": 4}),
    "glm": ("glm4_moe", GLM),
    "glm-groups": (
        "glm4_moe",
        {**GLM, "num_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    ),
    "glm-partial-rotary": ("glm4_moe", {**GLM, "partial_rotary_factor": 0.67}),
    "glm-bias-no-norm": ("glm4_moe", {**GLM, "attention_bias": True, "qk_norm": "none"}),
    "glm-bias-norm": ("glm4_moe", {**GLM, "attention_bias": True, "norm_topk_prob": False}),
    "glm-dense-first": (
        "glm4_moe",
        {**GLM, "num_hidden_layers": 3, "mlp_only_layers": (0,), "routed_scaling_factor": 2.5},
    ),
    "glm-two-shared-tied": (
        "glm4_moe",
        {**GLM, "n_shared_experts": 2, "tie_word_embeddings": True},
    ),
    "glm-no-shared": ("glm4_moe", {**GLM, "n_shared_experts": 0}),
    "glm-top1": ("glm4_moe", {**GLM, "num_experts_per_tok": 1}),
    "glm-all-experts": ("glm4_moe", {**GLM, "num_experts_per_tok": 5}),
}
cases = pytest.mark.parametrize(("model_type", "fields"), CASES.values(), ids=CASES)


def build(fields: dict, seed: int = 0) -> Transformer:
    """A model with nothing left at zero or one, so that every tensor shows in the logits."""
    model = Transformer(ModelConfig(**fields)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn * 0.3 + (1 if "norm" in name else 0))
    return model.eval()


def ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(67, (batch, length), generator=torch.Generator().manual_seed(3))


def load_hf(path: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # its grouped one refuses odd widths
        output_loading_info=True,
    )
    missing = {name for name in info["missing_keys"] if "shared_experts" not in name}
    after_last = f"model.layers.{model.config.num_hidden_layers}."  # the predictor, which it ignores
    unexpected = {name for name in info["unexpected_keys"] if not name.startswith(after_last)}
    assert not missing and not unexpected and not info["mismatched_keys"]
    return model.eval()


@cases
def test_logits_agree_both_ways(model_type: str, fields: dict, tmp_path: Path) -> None:
    ours = build(fields)
    family = save_model(ours, tmp_path / "ours")
    assert family.model_type == model_type
    theirs = load_hf(tmp_path / "ours")
    assert type(theirs).__name__ == family.architecture
    with torch.no_grad():
        expected = theirs(ids()).logits
        torch.testing.assert_close(ours(ids()), expected, atol=1e-4, rtol=1e-4)
        theirs.save_pretrained(tmp_path / "theirs")
        back = load_model(tmp_path / "theirs")
        torch.testing.assert_close(back(ids()), expected, atol=1e-4, rtol=1e-4)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


@pytest.mark.parametrize("name", ["qwen3moe", "olmoe-raw-tied", "glm-groups"])
def test_loss_and_router_gradients_agree(name: str, tmp_path: Path) -> None:
    ours = build(CASES[name][1])
    save_model(ours, tmp_path / "m")
    theirs = load_hf(tmp_path / "m")
    loss = F.cross_entropy(ours(ids())[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    their_loss = theirs(ids(), labels=ids()).loss
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    their_loss.backward()
    for layer, their_layer in zip(ours.layers, theirs.model.layers, strict=True):
        gradient, wanted = layer.mlp.router.weight.grad, their_layer.mlp.gate.weight.grad
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)


@cases
def test_config_round_trip(model_type: str, fields: dict) -> None:
    config = ModelConfig(**fields, eos_token_id=7)
    family = family_for(config)
    raw = json.loads(json.dumps(family.to_hf(config)))
    assert family_of(raw, "x") is family
    back = family.from_hf(raw, "x")
    assert family.to_hf(back) == raw
    assert back.model_type == model_type
    assert (back.num_params(), back.eos_token_id) == (config.num_params(), 7)
    assert back.sparse_layers == config.sparse_layers


NATIVE_CASES = {
    "switch": {**SPARSE, "num_experts_per_tok": 1, "router": "switch"},
    "expert-choice": {**SPARSE, "router": "expert_choice"},
    "biased-softmax": {**SPARSE, "attention_bias": True},
    "scaled-softmax": {**SPARSE, "routed_scaling_factor": 2.0},
    "shared-softmax": {**SPARSE, "n_shared_experts": 1},
    "partial-dense": {**DENSE, "partial_rotary_factor": 0.34},
    "dense-full-norm": {**DENSE, "qk_norm": "full"},
    "olmoe-odd-heads": {**OLMOE, "head_dim": 4},
    "olmoe-dense-layer": {**OLMOE, "mlp_only_layers": (1,)},
    "glm-dense-last": {**GLM, "mlp_only_layers": (1,)},
    "glm-full-norm": {**GLM, "qk_norm": "full"},
    "glm-one-expert": {**GLM, "num_experts": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("fields", NATIVE_CASES.values(), ids=NATIVE_CASES)
def test_what_no_family_holds_round_trips_as_native(fields: dict, tmp_path: Path) -> None:
    ours = build(fields)
    assert save_model(ours, tmp_path / "m") is NATIVE
    back = load_model(tmp_path / "m")
    assert back.config == ours.config.model_copy(update={"model_type": "tenfold"})
    assert load_config(tmp_path / "m") == back.config
    assert torch.equal(back(ids()), ours(ids()))
