"""What the families share: a Family's shape, config.json fields, tensor names. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError

Index = tuple[int | slice, ...]
"""Selects a part of a tensor; empty selects all of it."""

TensorMap = dict[str, tuple[str, Index]]
"""Hugging Face tensor name -> (our name, the part of ours that it holds)."""

ALL: Index = ()


def tensor_map(config: ModelConfig) -> TensorMap:
    """The hub's on-disk names: one matrix a projection and expert, as Qwen and GLM publish."""
    names = _whole("model.embed_tokens.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("lm_head.weight", ALL)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        norms = (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight")
        names |= _whole(*norms) | _attention(config, f"{prefix}.self_attn")
        if layer in config.sparse_layers:
            names |= _sparse(config, f"{prefix}.mlp")
        else:
            names |= _swiglu(f"{prefix}.mlp", config.intermediate_size)
    return names


def _whole(*names: str) -> TensorMap:
    """Tensors that are called the same but for Hugging Face's leading `model.`"""
    return {name: (_ours(name), ALL) for name in names}


def _ours(name: str) -> str:
    return name.removeprefix("model.")


def _attention(config: ModelConfig, prefix: str) -> TensorMap:
    parts = [f"{prefix}.{part}_proj.weight" for part in "qkvo"]
    if config.attention_bias:
        parts += [f"{prefix}.{part}_proj.bias" for part in "qkv"]
    if config.qk_norm != "none":
        parts += [f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"]
    return _whole(*parts)


def _swiglu(prefix: str, width: int) -> TensorMap:
    ours = _ours(prefix)
    return {
        f"{prefix}.gate_proj.weight": (f"{ours}.gate_up.weight", (slice(0, width),)),
        f"{prefix}.up_proj.weight": (f"{ours}.gate_up.weight", (slice(width, 2 * width),)),
        f"{prefix}.down_proj.weight": (f"{ours}.down.weight", ALL),
    }


def _sparse(config: ModelConfig, prefix: str) -> TensorMap:
    ours, F = _ours(prefix), config.moe_intermediate_size
    names: TensorMap = {f"{prefix}.gate.weight": (f"{ours}.router.weight", ALL)}
    if config.router == "sigmoid":
        names[f"{prefix}.gate.e_score_correction_bias"] = (f"{ours}.router.bias", ALL)
    for e in range(config.num_experts):
        expert, gate_up = f"{prefix}.experts.{e}", f"{ours}.experts.gate_up"
        names[f"{expert}.gate_proj.weight"] = (gate_up, (e, slice(0, F)))
        names[f"{expert}.up_proj.weight"] = (gate_up, (e, slice(F, 2 * F)))
        names[f"{expert}.down_proj.weight"] = (f"{ours}.experts.down", (e,))
    if config.n_shared_experts:
        names |= _swiglu(f"{prefix}.shared_experts", config.n_shared_experts * F)
    return names


def is_redundant(config: ModelConfig, name: str) -> bool:
    """Tensors that published checkpoints may hold and the model does not need."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")


@dataclass(frozen=True)
class Family:
    """One published architecture: which configs it can hold, and how it writes them down."""

    model_type: str
    architecture: str
    fits: Callable[[ModelConfig], bool]
    """Whether transformers would compute the same function."""
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    """The contents of config.json."""
    from_hf: Callable[[dict[str, Any], str], ModelConfig]
    """The reverse; a TenfoldError names the source and what tenfold does not model."""
    tensor_map: Callable[[ModelConfig], TensorMap] = tensor_map
    is_redundant: Callable[[ModelConfig, str], bool] = is_redundant


def renormalizes(config: ModelConfig) -> bool:
    """Whether the chosen experts' weights sum to one; a softmax over the top-k always does."""
    return config.norm_topk_prob or config.router == "topk_softmax"


def routes_by_softmax(config: ModelConfig) -> bool:
    """Sparse with a plain softmax router and nothing beside its routed experts."""
    return (
        config.is_sparse
        and config.router in ("softmax", "topk_softmax")
        and config.routed_scaling_factor == 1
        and config.n_shared_experts == 0
    )


def hf_fields(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Fields that every decoder-only family has under the same name."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,  # read by engines older than `rope_parameters`
        "rope_parameters": rope,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": None,
    }


_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


class HfReader:
    """A config.json being read: takes fields, and refuses values tenfold does not model."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw = raw
        self.source = source
        self.only("hidden_act", "silu")
        self.only("quantization_config")
        self.rope = {**self._rope_dict("rope_parameters"), **self._rope_dict("rope_scaling")}

    def fail(self, name: str, accepted: str) -> NoReturn:
        given = self.raw.get(name)
        raise TenfoldError(f"{self.source}: {name} {given!r} is not supported, only {accepted}")

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse a field that is there with another value; null always passes."""
        if self.raw.get(name) is not None and self.raw[name] not in accepted:
            self.fail(name, " or ".join(repr(value) for value in accepted) or "null")

    def need(self, *names: str) -> Any:
        """The field under the first of its names that is there."""
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        raise TenfoldError(f"{self.source}: field {' or '.join(names)} is missing")

    def count(self, name: str, least: int = 0) -> int:
        """A whole number that is needed before the config can be validated."""
        value = self.need(name)
        if type(value) is not int or value < least:
            self.fail(name, f"a whole number of at least {least}")
        return value

    def head_dim(self) -> int:
        """As written, or the heads' even share of the width."""
        share = self.count("hidden_size") // self.count("num_attention_heads", least=1)
        return self.raw.get("head_dim") or share

    def build(self, **fields: Any) -> ModelConfig:
        """The shared fields and the family's own, validated."""
        raw = self.raw
        eos = raw.get("eos_token_id")
        shared = {
            name: self.need(name)
            for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
            )
        }  # fmt: skip
        shared |= {
            "rope_theta": self.rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            "initializer_range": raw.get("initializer_range", 0.02),
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            # A list names the end of the text first, then the ends of chat turns.
            "eos_token_id": eos[0] if isinstance(eos, list) and eos else eos,
        }
        return ModelConfig.parse(shared | fields, self.source)

    def _rope_dict(self, name: str) -> dict[str, Any]:
        rope = self.raw.get(name) or {}
        if not isinstance(rope, dict) or not rope.keys() <= _ROPE_KEYS:
            self.fail(name, "unscaled rotary positions (rope_type 'default')")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            self.fail(name, "unscaled rotary positions (rope_type 'default')")
        return rope
