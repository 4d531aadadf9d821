"""GGUF metadata as a ModelConfig, one function an architecture.

The keys are those of llama.cpp's converter, and what stands in for one that a file leaves out is what
llama.cpp takes then.
"""

import reprlib
from typing import Any

from tenfold.checkpoint.gguf.fields import Fields
from tenfold.checkpoint.gguf.rope import rope_scaling
from tenfold.checkpoint.stored import Stored
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError, nearest

SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # expert_gating_func


def gguf_config(metadata: dict[str, Any], tensors: dict[str, Stored], source: str) -> ModelConfig:
    """The config of a model, its `model_type` the Hugging Face family that the file was made from.

    Raises TenfoldError naming `source` and the key for an architecture that is not known, and for
    what tenfold does not model.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        given, known = reprlib.repr(architecture), ", ".join(_ARCHITECTURES)
        near = nearest(given, _ARCHITECTURES)
        raise TenfoldError(f"{source}: unknown general.architecture {given}{near}; known: {known}")
    fields = Fields(metadata, tensors, source)
    return ModelConfig.parse(_shared(fields) | _ARCHITECTURES[architecture](fields), source)


def _shared(fields: Fields) -> dict[str, Any]:
    vocab_size, layers = fields.rows("token_embd.weight"), fields.whole("block_count")
    if layers > len(fields.tensors):
        fields.fail("block_count", f"as many as its {len(fields.tensors)} tensors can make up")
    fields.only("attention.causal", True)  # llama.cpp heeds both for every architecture
    fields.only("rope.scaling.attn_factor", 1.0)
    ends = [fields.token(name, vocab_size) for name in ("eos", "eot", "eom")]
    eos = tuple(dict.fromkeys(token for token in ends if token is not None))
    return {
        "vocab_size": vocab_size,
        "hidden_size": fields.whole("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": fields.whole("attention.head_count"),
        "intermediate_size": fields.whole("feed_forward_length", 0),
        "max_position_embeddings": fields.whole("context_length"),
        "rope_theta": fields.real("rope.freq_base", 10000.0),
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in fields.tensors,
        "bos_token_id": fields.token("bos", vocab_size),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": fields.token("padding", vocab_size),
    }


def _grouped_query(fields: Fields) -> dict[str, Any]:
    """Attention of all but deepseek2."""
    heads = fields.whole("attention.head_count")
    head_dim = fields.whole("attention.key_length", fields.whole("embedding_length") // max(heads, 1))
    fields.only("attention.value_length", head_dim)
    fields.only("rope.dimension_count", head_dim)
    return {
        "num_key_value_heads": fields.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_scaling": rope_scaling(fields, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in fields.tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in fields.tensors,
    }


def _experts(fields: Fields, *gates: int, norm_topk_prob: bool = False) -> dict[str, Any]:
    """Experts, as wide as a dense layer where nothing else is said; `gates` are the scores known."""
    fields.only("expert_gating_func", 0, *gates)  # 0 is llama.cpp's for none given
    width = fields.whole("expert_feed_forward_length", fields.whole("feed_forward_length", 0))
    return {
        "num_experts": fields.whole("expert_count"),
        "num_experts_per_tok": fields.whole("expert_used_count"),
        "moe_intermediate_size": width,
        "norm_topk_prob": fields.flag("expert_weights_norm", norm_topk_prob),
        "routed_scaling_factor": fields.real("expert_weights_scale", 0.0) or 1.0,
    }


def _llama(fields: Fields) -> dict[str, Any]:
    """Llama, Mistral and Mixtral."""
    window = fields.whole("attention.sliding_window", 0) or None
    values = _grouped_query(fields) | {"qk_norm": "none", "sliding_window": window}
    if fields.whole("expert_count", 0):
        mixtral = {"model_type": "mixtral", "router": "topk_softmax"}
        return values | _experts(fields, SOFTMAX, norm_topk_prob=True) | mixtral
    mlp_bias = "blk.0.ffn_down.bias" in fields.tensors
    return values | {"model_type": "mistral" if window else "llama", "mlp_bias": mlp_bias}


def _olmoe(fields: Fields) -> dict[str, Any]:
    values = _grouped_query(fields) | _experts(fields, SOFTMAX)
    return values | {"model_type": "olmoe", "qk_norm": "full"}


def _qwen2moe(fields: Fields) -> dict[str, Any]:
    values = _grouped_query(fields) | _experts(fields, SOFTMAX)
    return values | {
        "model_type": "qwen2_moe",
        "qk_norm": "none",
        "shared_expert_intermediate_size": fields.rows("blk.0.ffn_gate_shexp.weight"),
        "shared_expert_gate": True,
    }


def _qwen3(fields: Fields) -> dict[str, Any]:
    return _grouped_query(fields) | {"model_type": "qwen3", "qk_norm": "head"}


def _qwen3moe(fields: Fields) -> dict[str, Any]:
    values = _grouped_query(fields) | _experts(fields, SOFTMAX, norm_topk_prob=True)
    return values | {"model_type": "qwen3_moe", "qk_norm": "head"}


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    """Every other layer slides, from the first on; YaRN's bounds are not rounded (OpenAI's config)."""
    fields.only("attention.sliding_window_pattern", 2)
    values = _grouped_query(fields) | _experts(fields, SOFTMAX_OF_CHOSEN)
    if values["rope_scaling"] is not None and values["rope_scaling"]["rope_type"] == "yarn":
        values["rope_scaling"]["truncate"] = False
    kinds = ("sliding_attention", "full_attention")
    return values | {
        "model_type": "gpt_oss",
        "qk_norm": "none",
        "attention_sinks": True,
        "sliding_window": fields.whole("attention.sliding_window"),
        "layer_types": tuple(kinds[layer % 2] for layer in range(fields.whole("block_count"))),
        "hidden_act": "clamped_swiglu",
        "moe_bias": True,
        "router": "topk_softmax",
    }


def _deepseek2(fields: Fields) -> dict[str, Any]:
    """DeepSeek-V2 (softmax) and V3 (sigmoid)."""
    values = _latent(fields) | _experts(fields, SOFTMAX, SIGMOID)
    sigmoid = fields.get("expert_gating_func") == SIGMOID
    dense = min(fields.whole("leading_dense_block_count", 0), fields.whole("block_count"))
    return values | {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "router": "sigmoid" if sigmoid else "softmax",
        "n_shared_experts": fields.whole("expert_shared_count", 0),
        "mlp_only_layers": tuple(range(dense)),
        "n_group": fields.whole("expert_group_count", 0) or 1,
        "topk_group": fields.whole("expert_group_used_count", 0) or 1,
    }


def _latent(fields: Fields) -> dict[str, Any]:
    """Multi-head latent attention. Files that are made for decoding in the latent space give the
    widths of a head there as key_length and value_length, and the plain ones under names of their own."""
    rotated = fields.whole("rope.dimension_count")
    key = fields.whole("attention.key_length_mla", fields.whole("attention.key_length"))
    if key <= rotated:
        fields.fail("rope.dimension_count", f"fewer than the {key} dimensions of a key")
    scaling = rope_scaling(fields, rotated)
    sharpened = fields.real("rope.scaling.yarn_log_multiplier", 0.0)
    if scaling is not None and sharpened:
        # Written as a tenth of mscale_all_dim, which mscale equals in every published config.
        scaling["mscale"] = scaling["mscale_all_dim"] = round(10 * sharpened, 6)
    return {
        "num_key_value_heads": fields.whole("attention.head_count"),
        "head_dim": rotated,
        "qk_norm": "none",
        "kv_lora_rank": fields.whole("attention.kv_lora_rank"),
        "q_lora_rank": fields.whole("attention.q_lora_rank", 0),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": fields.whole("attention.value_length_mla", fields.whole("attention.value_length")),
        "rope_scaling": scaling,
        "rope_interleave": True,
    }


_ARCHITECTURES = {
    "llama": _llama,
    "olmoe": _olmoe,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "deepseek2": _deepseek2,
    "gpt-oss": _gpt_oss,
}
