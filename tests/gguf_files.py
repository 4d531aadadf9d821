"""Writing a model as llama.cpp's converter would: the inverse of what tenfold reads, done by itself."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from random_families import random_fields

from tenfold.config import ModelConfig
from tenfold.model.transformer import Transformer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
"""By Hugging Face family."""
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.down": "ffn_down",
    "mlp.shared_experts.down": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
Tensors = dict[str, np.ndarray]


def expressible(family: str, seed: int) -> dict[str, Any]:
    """Random fields of a family, less what GGUF metadata have no key for."""
    fields = random_fields(family, seed)
    lost = {"mlp_only_layers", "decoder_sparse_step", "num_nextn_predict_layers"}
    if family.startswith("deepseek"):
        lost = {"num_nextn_predict_layers", "attention_bias", "attention_out_bias", "rope_interleave"}
    if family.startswith("qwen"):
        lost |= {"sliding_window", "layer_types"}
    fields = {name: value for name, value in fields.items() if name not in lost}
    if family.startswith("deepseek"):
        fields["rope_interleave"] = True
    if family == "mistral":
        fields.setdefault("sliding_window", 3)  # without, its file is a Llama's
    if family == "gpt_oss":
        fields["layer_types"] = ("sliding_attention", "full_attention", "sliding_attention")
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = _scaling(family, fields["rope_scaling"])
        fields["rope_theta"] = 1e7  # so that heads this small have frequencies on all sides
    return fields


def _scaling(family: str, scaling: dict[str, Any]) -> dict[str, Any]:
    scaling = {name: value for name, value in scaling.items() if name not in ("mscale", "truncate")}
    sharpness = scaling.pop("mscale_all_dim", None)
    if sharpness and family.startswith("deepseek"):
        scaling |= {"mscale": sharpness, "mscale_all_dim": sharpness}
    if scaling["rope_type"] == "llama3":
        scaling["original_max_position_embeddings"] = 8192  # the converter knows no other
    if scaling["rope_type"] == "yarn" and family == "gpt_oss":
        scaling["truncate"] = False
    return scaling


def write_model(
    path: Path,
    model: Transformer,
    quantised: Kind | None = None,
    split_kv_b: bool = True,
    fused_experts: bool = False,
    metadata: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    **options: Any,
) -> None:
    """A whole GGUF file, its matrices `quantised`; then `metadata` and `tensors` replace what it holds,
    None taking things away. `options` are GGUFWriter's."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type], **options)
    _write_metadata(writer, model.config, split_kv_b)
    for key, value in (metadata or {}).items():
        set_key(writer, key, value)
    held = gguf_tensors(model, split_kv_b, fused_experts) | (tensors or {})
    for name, array in held.items():
        if array is not None and quantised is not None and array.ndim > 1:
            writer.add_tensor(name, gguf.quantize(array, quantised), raw_dtype=quantised)
        elif array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def set_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        del writer.kv_data[0][key]
    elif type(value) is int and value >= 0:
        writer.add_uint32(key, value)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))


def _write_metadata(writer: gguf.GGUFWriter, config: ModelConfig, split_kv_b: bool) -> None:
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    widths = {"mixtral": config.moe_intermediate_size, "olmoe": config.moe_intermediate_size}
    writer.add_feed_forward_length(widths.get(config.model_type, config.intermediate_size))
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if config.is_latent:
        _latent_metadata(writer, config, split_kv_b)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.num_experts:
        _expert_metadata(writer, config)
    _rope_metadata(writer, config)


def _latent_metadata(writer: gguf.GGUFWriter, config: ModelConfig, split_kv_b: bool) -> None:
    key, rank = config.qk_nope_head_dim + config.qk_rope_head_dim, config.kv_lora_rank
    writer.add_head_count_kv(1 if split_kv_b else config.num_attention_heads)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_kv_lora_rank(rank)
    if config.q_lora_rank:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_key_length(rank + config.qk_rope_head_dim if split_kv_b else key)
    writer.add_value_length(rank if split_kv_b else config.v_head_dim)
    if split_kv_b:
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(config.v_head_dim)
    writer.add_leading_dense_block_count(len(config.mlp_only_layers))
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.n_group > 1:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    sigmoid = config.router == "sigmoid"
    writer.add_expert_gating_func(
        gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
    )


def _expert_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type not in ("mixtral", "olmoe"):  # which say it as feed_forward_length
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.router != "topk_softmax":
        writer.add_expert_weights_norm(config.norm_topk_prob)


def _rope_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.rope_type == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        if scaling.attention_factor is not None:
            writer.add_rope_scaling_yarn_attn_factor(scaling.attention_factor)
        if scaling.mscale_all_dim:
            writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def llama3_divisors(config: ModelConfig) -> np.ndarray:
    """By wavelengths, as Llama 3.1's reference code has it."""
    scaling, divisors = config.rope_scaling, []
    context, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    for n in range(0, config.head_dim, 2):
        wavelength = 2 * np.pi * config.rope_theta ** (n / config.head_dim)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(scaling.factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)


def gguf_tensors(model: Transformer, split_kv_b: bool, fused_experts: bool) -> Tensors:
    """The model's tensors under llama.cpp's names and in its layouts."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            parts = _layer_tensor(config, rest, array, split_kv_b, fused_experts)
            tensors |= {f"blk.{layer}.{part}": value for part, value in parts.items()}
        else:
            tops = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
            tensors[tops[name.removesuffix(".weight")] + ".weight"] = array
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    return {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def _layer_tensor(
    config: ModelConfig, name: str, array: np.ndarray, split_kv_b: bool, fused_experts: bool
) -> Tensors:
    module, _, kind = name.rpartition(".")
    if module == "mlp.experts":
        return _expert_tensor(kind, array, fused_experts)
    if module == "mlp.router":
        return {
            "weight": {"ffn_gate_inp.weight": array},
            "logit_bias": {"ffn_gate_inp.bias": array},
            "bias": {"exp_probs_b.bias": array},
        }[kind]
    if name == "self_attn.sinks":
        return {"attn_sinks.weight": array}
    if name == "self_attn.kv_b_proj.weight":
        return _kv_b(config, array) if split_kv_b else {"attn_kv_b.weight": array}
    if module.endswith(".gate_up"):
        half, suffix = len(array) // 2, "_shexp" if "shared" in module else ""
        return {f"ffn_gate{suffix}.{kind}": array[:half], f"ffn_up{suffix}.{kind}": array[half:]}
    if config.model_type in ("llama", "mistral", "mixtral") and module.endswith(("q_proj", "k_proj")):
        array = permuted(array, config.head_dim)
    if config.model_type == "gpt_oss" and module == "post_attention_layernorm":
        return {"post_attention_norm.weight": array}
    if module == "mlp.shared_expert_gate":
        array = array[0]  # the converter squeezes
    return {f"{NAMES[module]}.{kind}": array}


def _expert_tensor(kind: str, array: np.ndarray, fused: bool) -> Tensors:
    kind, ending = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
    if kind == "down":
        return {f"ffn_down_exps.{ending}": array}
    if fused:
        return {f"ffn_gate_up_exps.{ending}": array}
    half = array.shape[1] // 2
    return {f"ffn_gate_exps.{ending}": array[:, :half], f"ffn_up_exps.{ending}": array[:, half:]}


def _kv_b(config: ModelConfig, array: np.ndarray) -> Tensors:
    keys, values = [], []
    width = config.qk_nope_head_dim + config.v_head_dim
    for head in range(config.num_attention_heads):
        rows = array[head * width : (head + 1) * width]
        keys.append(rows[: config.qk_nope_head_dim].T)
        values.append(rows[config.qk_nope_head_dim :])
    return {"attn_k_b.weight": np.stack(keys), "attn_v_b.weight": np.stack(values)}


def permuted(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Row by row: what turns with the row half a head on comes to stand beside it."""
    out = np.empty_like(array)
    for head in range(len(array) // head_dim):
        for n in range(head_dim // 2):
            for side in (0, 1):
                out[head * head_dim + 2 * n + side] = array[head * head_dim + side * head_dim // 2 + n]
    return out


def quantise(model: Transformer, kind: Kind) -> None:
    """Round every matrix, in place, to what is left of it after it was quantised."""
    for tensor in model.state_dict().values():
        if tensor.ndim > 1 and len(tensor) > 1:  # a gate of one row is a vector in the file
            tensor.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind)))
