"""Where a GGUF file's tensors go. The names are llama.cpp's (`gguf.constants.TENSOR_NAMES`)."""

from typing import TYPE_CHECKING

from tenfold.checkpoint.families.common import swiglu
from tenfold.checkpoint.gguf.rope import FACTORS
from tenfold.checkpoint.slot import Slot, SlotMap, part
from tenfold.checkpoint.stored import Stored
from tenfold.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

READ_BY_CONFIG = (FACTORS,)
"""Tensors that are settings, and have no place in a model."""
PERMUTED = ("llama", "mistral", "mixtral")
"""Families that llama.cpp keeps as `llama`, whose q and k it reorders for RoPE of neighbours."""


def gguf_slots(config: ModelConfig, tensors: dict[str, Stored]) -> SlotMap:
    """Every tensor that the model needs; where there are two layouts, the one that `tensors` has."""
    slots = {"token_embd.weight": Slot("embed_tokens.weight"), "output_norm.weight": Slot("norm.weight")}
    if not config.tie_word_embeddings:
        slots["output.weight"] = Slot("lm_head.weight")
    sparse = set(config.sparse_layers)
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"blk.{layer}", f"layers.{layer}"
        second_norm = "post_attention_norm" if config.model_type == "gpt_oss" else "ffn_norm"
        slots[f"{theirs}.attn_norm.weight"] = Slot(f"{ours}.input_layernorm.weight")
        slots[f"{theirs}.{second_norm}.weight"] = Slot(f"{ours}.post_attention_layernorm.weight")
        if config.is_latent:
            split = f"{theirs}.attn_k_b.weight" in tensors
            slots |= _latent(config, theirs, f"{ours}.self_attn", split)
        else:
            slots |= _attention(config, theirs, f"{ours}.self_attn")
        if layer in sparse:
            fused = f"{theirs}.ffn_gate_up_exps.weight" in tensors
            slots |= _sparse(config, theirs, f"{ours}.mlp", fused)
        else:
            slots |= _swiglu(theirs, "", f"{ours}.mlp", config.intermediate_size, config.mlp_bias)
    return slots


def _attention(config: ModelConfig, theirs: str, ours: str) -> SlotMap:
    slots = {f"{theirs}.attn_output.weight": Slot(f"{ours}.o_proj.weight")}
    for kind in ["weight"] + ["bias"] * config.attention_bias:
        slots[f"{theirs}.attn_v.{kind}"] = Slot(f"{ours}.v_proj.{kind}")
        for name in "qk":
            slots[f"{theirs}.attn_{name}.{kind}"] = _rotated(config, f"{ours}.{name}_proj.{kind}")
    if config.attention_out_bias:
        slots[f"{theirs}.attn_output.bias"] = Slot(f"{ours}.o_proj.bias")
    if config.qk_norm != "none":
        for name in "qk":
            slots[f"{theirs}.attn_{name}_norm.weight"] = Slot(f"{ours}.{name}_norm.weight")
    if config.attention_sinks:
        slots[f"{theirs}.attn_sinks.weight"] = Slot(f"{ours}.sinks")
    return slots


def _rotated(config: ModelConfig, name: str) -> Slot:
    """A q or k projection: rows n and n + half of each head are neighbours in a `llama` file."""
    if config.model_type not in PERMUTED:
        return Slot(name)
    return Slot(name, lambda t: t.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2), 0, 3)


def _latent(config: ModelConfig, theirs: str, ours: str, split: bool) -> SlotMap:
    names = {"attn_kv_a_mqa": "kv_a_proj_with_mqa", "attn_kv_a_norm": "kv_a_layernorm"}
    names["attn_output"] = "o_proj"
    if config.q_lora_rank:
        names |= {"attn_q_a": "q_a_proj", "attn_q_a_norm": "q_a_layernorm", "attn_q_b": "q_b_proj"}
    else:
        names["attn_q"] = "q_proj"
    if not split:
        names["attn_kv_b"] = "kv_b_proj"
    slots = {f"{theirs}.{name}.weight": Slot(f"{ours}.{our_name}.weight") for name, our_name in names.items()}
    return slots | (_split_kv_b(config, theirs, f"{ours}.kv_b_proj.weight") if split else {})


def _split_kv_b(config: ModelConfig, theirs: str, name: str) -> SlotMap:
    """Keys' and values' halves of each head, the keys' transposed to meet the query in the latent space."""
    nope = config.qk_nope_head_dim

    def heads(tensor: "Tensor") -> "Tensor":
        by_head: Tensor = tensor.unflatten(0, (config.num_attention_heads, -1))
        return by_head

    return {
        f"{theirs}.attn_k_b.weight": Slot(name, lambda tensor: heads(tensor)[:, :nope].mT),
        f"{theirs}.attn_v_b.weight": Slot(name, lambda tensor: heads(tensor)[:, nope:]),
    }


def _swiglu(theirs: str, suffix: str, ours: str, width: int, bias: bool) -> SlotMap:
    names = (f"{theirs}.ffn_gate{suffix}", f"{theirs}.ffn_up{suffix}", f"{theirs}.ffn_down{suffix}")
    return swiglu(names, ours, width, bias)


def _sparse(config: ModelConfig, theirs: str, ours: str, fused: bool) -> SlotMap:
    slots = {f"{theirs}.ffn_gate_inp.weight": Slot(f"{ours}.router.weight")}
    if config.router == "sigmoid":
        slots[f"{theirs}.exp_probs_b.bias"] = Slot(f"{ours}.router.bias")
    slots |= _experts(config, theirs, f"{ours}.experts", fused, "weight", "")
    if config.moe_bias:
        slots[f"{theirs}.ffn_gate_inp.bias"] = Slot(f"{ours}.router.logit_bias")
        slots |= _experts(config, theirs, f"{ours}.experts", fused, "bias", "_bias")
    if config.shared_width:
        slots |= _swiglu(theirs, "_shexp", f"{ours}.shared_experts", config.shared_width, bias=False)
    if config.shared_expert_gate:
        slots[f"{theirs}.ffn_gate_inp_shexp.weight"] = Slot(f"{ours}.shared_expert_gate.weight", part(0))
    return slots


def _experts(config: ModelConfig, theirs: str, ours: str, fused: bool, kind: str, suffix: str) -> SlotMap:
    """All experts in one tensor a projection; gate and up in one or in two."""
    slots = {f"{theirs}.ffn_down_exps.{kind}": Slot(f"{ours}.down{suffix}")}
    gate_up, F = f"{ours}.gate_up{suffix}", config.moe_intermediate_size
    if fused:
        return slots | {f"{theirs}.ffn_gate_up_exps.{kind}": Slot(gate_up)}
    return slots | {
        f"{theirs}.ffn_gate_exps.{kind}": Slot(gate_up, part(slice(None), slice(0, F))),
        f"{theirs}.ffn_up_exps.{kind}": Slot(gate_up, part(slice(None), slice(F, 2 * F))),
    }
