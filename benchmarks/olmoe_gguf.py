"""The random weights of `tenfold bench --shape olmoe-1b-7b` as a GGUF file that llama.cpp runs."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Size
from vocabulary import add_to_gguf

from tenfold.checkpoint.pack.layout import Plain
from tenfold.config import ModelConfig
from tenfold.engine.random_weights import RandomRows, plain_tensor

MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
Array = np.ndarray[Any, np.dtype[Any]]


class _Weights:
    """As `RandomRows.matrix`, but the rows are in one of ggml's formats."""

    def __init__(self, form: str):
        self.source = RandomRows()
        self.type = gguf.GGMLQuantizationType[form]
        self._rows: dict[int, Array] = {}

    def matrix(self, name: str, rows: int, columns: int) -> Array:
        if columns not in self._rows:
            self._rows[columns] = gguf.quants.quantize(self.source.rows(columns).numpy(), self.type)
        matrix: Array = self._rows[columns][self.source.order(name, rows).numpy()]
        return matrix

    def plain(self, name: str, *shape: int) -> Array:
        return plain_tensor(self.source, Plain(name, Size(shape))).numpy()


def write_olmoe(path: Path, config: ModelConfig, form: str, vocabulary: bool = False) -> None:
    """All matrices but routers in `form` (Q4_0, Q8_0, BF16), with made-up tokens where a server needs some;
    the file is there only once it is whole."""
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "olmoe")
    _write_settings(writer, config)
    if vocabulary:
        add_to_gguf(writer, config.vocab_size)
    else:
        writer.add_tokenizer_model("no_vocab")
    weights = _Weights(form)
    V, D = config.vocab_size, config.hidden_size

    def add(name: str, data: Array) -> None:
        writer.add_tensor(name, data, raw_dtype=weights.type if data.dtype != np.float32 else None)

    add("token_embd.weight", weights.matrix("embed_tokens.weight", V, D))
    add("output.weight", weights.matrix("lm_head.weight", V, D))
    add("output_norm.weight", weights.plain("norm.weight", D))
    for layer in range(config.num_hidden_layers):
        for name, data in _layer(weights, config, f"layers.{layer}").items():
            add(f"blk.{layer}.{name}.weight", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _layer(weights: _Weights, config: ModelConfig, ours: str) -> dict[str, Array]:
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    tensors = {theirs: weights.matrix(f"{ours}.{name}.weight", D, D) for theirs, name in MATRICES.items()}
    tensors |= {theirs: weights.plain(f"{ours}.{name}.weight", D) for theirs, name in NORMS.items()}
    tensors["ffn_gate_inp"] = weights.plain(f"{ours}.mlp.router.weight", E, D)
    for side, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
        names = [f"{ours}.mlp.experts.{expert}.{side}" for expert in range(E)]
        tensors[f"ffn_{side}_exps"] = np.stack([weights.matrix(name, rows, columns) for name in names])
    return tensors


def _write_settings(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
