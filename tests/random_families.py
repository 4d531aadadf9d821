"""Small random configs of every published decoder family, each switching its options on and off."""

import random
from typing import Any

FAMILIES = (
    "llama", "mistral", "qwen3", "qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "granitemoe",
    "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
EVEN_HEADS = {"olmoe", "qwen2_moe", "granitemoe"}
"""Families without a head_dim of their own."""
WINDOWS = [2, 3, 7]
"""Not 1, where transformers 5.23 decodes other tokens with its cache than without."""


def random_fields(family: str, seed: int) -> dict[str, Any]:
    """ModelConfig fields; `seed` 0 has top-k 1 and 1 has top-k E where the model is sparse."""
    rng = random.Random(f"{family} {seed}")
    fields = _shape(family, rng) | _PARTS[family](rng, seed)
    return fields | {"model_type": family, "rope_scaling": rng.choice(_scalings(rng))}


def _shape(family: str, rng: random.Random) -> dict[str, Any]:
    kv_heads, shared, head_dim = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([4, 6, 10])
    heads = kv_heads * shared
    widths = {True: [heads * head_dim], False: [17, 24, 31]}[family in EVEN_HEADS]
    if family == "llama":
        widths = [heads * 5, heads * 8]
    return {
        "vocab_size": rng.choice([61, 64, 97]),
        "hidden_size": rng.choice(widths),
        "intermediate_size": rng.choice([9, 20]),
        "num_hidden_layers": rng.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "rope_theta": rng.choice([1e4, 5e5]),
        "rms_norm_eps": rng.choice([1e-6, 1e-2]),
        "initializer_range": 0.3,
        "tie_word_embeddings": rng.random() < 0.4,
        "qk_norm": "none",
    }


def _scalings(rng: random.Random) -> list[dict[str, Any] | None]:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    mscale = {"mscale": 0.7, "mscale_all_dim": rng.choice([0.7, 1.1])}
    turns = {"beta_fast": 16.0, "beta_slow": 0.5, "truncate": False}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return [
        None,
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 8.0, **llama3},
        yarn,
        yarn | mscale | turns,
        yarn | {"attention_factor": 1.3},
    ]


def _experts(rng: random.Random, seed: int) -> dict[str, Any]:
    E = rng.choice([3, 5, 8])
    K = {0: 1, 1: E}.get(seed, rng.randint(1, E))
    return {
        "num_experts": E,
        "num_experts_per_tok": K,
        "moe_intermediate_size": rng.choice([7, 8, 16]),
    }


def _some_layers(rng: random.Random) -> dict[str, Any]:
    return rng.choice([{}, {"mlp_only_layers": (0,)}, {"decoder_sparse_step": 2}])


def _biased(rng: random.Random) -> dict[str, Any]:
    biased = rng.random() < 0.5
    return {"attention_bias": biased, "attention_out_bias": biased}


def _window(rng: random.Random, by_layer: bool) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {}
    window = {"sliding_window": rng.choice(WINDOWS)}
    alternating = ("full_attention", "sliding_attention", "full_attention")
    return window | ({"layer_types": alternating, "num_hidden_layers": 3} if by_layer else {})


def _llama(rng: random.Random, _: int) -> dict[str, Any]:
    return _biased(rng) | {"mlp_bias": rng.random() < 0.5}


def _mistral(rng: random.Random, _: int) -> dict[str, Any]:
    return _window(rng, by_layer=False)


def _qwen3(rng: random.Random, _: int) -> dict[str, Any]:
    return _biased(rng) | _window(rng, by_layer=True) | {"qk_norm": "head"}


def _qwen3_moe(rng: random.Random, seed: int) -> dict[str, Any]:
    raw = {"norm_topk_prob": rng.random() < 0.5, "qk_norm": "head"}
    return _biased(rng) | _window(rng, False) | _experts(rng, seed) | _some_layers(rng) | raw


def _olmoe(rng: random.Random, seed: int) -> dict[str, Any]:
    return _biased(rng) | _experts(rng, seed) | {"norm_topk_prob": rng.random() < 0.5, "qk_norm": "full"}


def _mixtral(rng: random.Random, seed: int) -> dict[str, Any]:
    return _window(rng, by_layer=False) | _experts(rng, seed) | {"router": "topk_softmax"}


def _qwen2_moe(rng: random.Random, seed: int) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": rng.choice([5, 12]), "shared_expert_gate": True}
    raw = {"norm_topk_prob": rng.random() < 0.5, "attention_bias": rng.random() < 0.5}
    return _window(rng, by_layer=True) | _experts(rng, seed) | _some_layers(rng) | shared | raw


def _granitemoe(rng: random.Random, seed: int) -> dict[str, Any]:
    multipliers = {
        "embedding_multiplier": rng.choice([1.0, 12.0]),
        "attention_multiplier": rng.choice([0.125, 0.4]),
        "residual_multiplier": rng.choice([1.0, 0.22]),
        "logits_scaling": rng.choice([1.0, 6.0]),
    }
    return _biased(rng) | _experts(rng, seed) | multipliers | {"router": "topk_softmax"}


def _gpt_oss(rng: random.Random, seed: int) -> dict[str, Any]:
    fixed = {"attention_sinks": True, "moe_bias": True, "hidden_act": "clamped_swiglu"}
    window = {"sliding_window": rng.choice(WINDOWS), "num_hidden_layers": 3}
    kinds = rng.choice([("sliding_attention", "full_attention"), ("full_attention", "sliding_attention")])
    window["layer_types"] = (*kinds, kinds[0])
    return _biased(rng) | _experts(rng, seed) | fixed | window | {"router": "topk_softmax"}


def _sigmoid(rng: random.Random, seed: int) -> dict[str, Any]:
    fields = _experts(rng, seed) | {"router": "sigmoid", "norm_topk_prob": rng.random() < 0.5}
    if fields["num_experts"] == 8 and fields["num_experts_per_tok"] <= 4:
        fields |= {"n_group": 4, "topk_group": 2}
    return fields | {"routed_scaling_factor": rng.choice([1.0, 2.5])} | rng.choice([{}, _first_dense()])


def _first_dense() -> dict[str, Any]:
    return {"mlp_only_layers": (0,)}


def _glm4_moe(rng: random.Random, seed: int) -> dict[str, Any]:
    return _sigmoid(rng, seed) | {
        "partial_rotary_factor": rng.choice([1.0, 0.67]),
        "head_dim": 6,
        "attention_bias": rng.random() < 0.5,
        "qk_norm": rng.choice(["none", "head"]),
        "n_shared_experts": rng.choice([1, 2]),
    }


def _latent(rng: random.Random) -> dict[str, Any]:
    heads, rotary = rng.choice([1, 2, 4]), rng.choice([4, 6])
    return _biased(rng) | {
        "hidden_size": heads * rng.choice([8, 9]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": rotary,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": rng.choice([3, 8]),
        "v_head_dim": rng.choice([5, 8]),
        "kv_lora_rank": rng.choice([7, 12]),
        "q_lora_rank": rng.choice([0, 9]),
        "n_shared_experts": rng.choice([1, 2]),
    }


def _deepseek_v2(rng: random.Random, seed: int) -> dict[str, Any]:
    fields = _experts(rng, seed) | {"norm_topk_prob": False, "rope_interleave": True}
    if fields["num_experts"] == 8 and fields["num_experts_per_tok"] <= 4:
        fields |= {"n_group": 4, "topk_group": 2}
    fields |= {"routed_scaling_factor": rng.choice([1.0, 16.0])} | rng.choice([{}, _first_dense()])
    even = {"qk_nope_head_dim": rng.choice([4, 8]), "kv_lora_rank": rng.choice([6, 12])}
    return _latent(rng) | even | fields  # transformers' complex numbers want even strides


def _deepseek_v3(rng: random.Random, seed: int) -> dict[str, Any]:
    extra = {"rope_interleave": seed != 2, "num_nextn_predict_layers": seed % 2}
    return _latent(rng) | _sigmoid(rng, seed) | extra


_PARTS = {name: globals()[f"_{name}"] for name in FAMILIES}
