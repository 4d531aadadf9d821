"""What the families share: a Family's shape, config.json fields, tensor names. No torch here."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn, get_args

from tenfold.checkpoint.quantization_config import weight_block_size
from tenfold.checkpoint.slot import Slot, SlotMap, part
from tenfold.config import ModelConfig, RopeScaling
from tenfold.errors import TenfoldError
from tenfold.parsed import MAX_LAYERS
from tenfold.switch_config import AnyConfig

Sparse = Callable[[ModelConfig, str], SlotMap]
"""The tensors of a sparse layer whose Hugging Face prefix is given."""


def tensor_map(config: ModelConfig) -> SlotMap:
    """The hub's on-disk names: one matrix a projection and expert, as Qwen, GLM and DeepSeek publish."""
    return decoder_map(config, sparse_mlp)


def decoder_map(config: ModelConfig, sparse: Sparse, mlp: str = "mlp") -> SlotMap:
    """Names of a whole model whose sparse layers are called `mlp` and hold what `sparse` says."""
    slots = whole("model.embed_tokens.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot("lm_head.weight")
    sparse_layers = set(config.sparse_layers)
    for layer in range(config.num_hidden_layers):
        kind = sparse if layer in sparse_layers else dense_mlp
        slots |= layer_map(config, f"model.layers.{layer}", kind, mlp)
    return slots


def layer_map(config: ModelConfig, prefix: str, kind: Sparse, mlp: str = "mlp") -> SlotMap:
    """One block: norms, attention, and the feed-forward that `kind` names."""
    norms = (f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight")
    attention = _latent_attention if config.is_latent else _attention
    return whole(*norms) | attention(config, f"{prefix}.self_attn") | kind(config, f"{prefix}.{mlp}")


def whole(*names: str) -> SlotMap:
    """Tensors that are called the same but for Hugging Face's leading `model.`"""
    return {name: Slot(ours(name)) for name in names}


def ours(name: str) -> str:
    """Our name of a module, from Hugging Face's."""
    return name.removeprefix("model.").replace(".block_sparse_moe", ".mlp")


def _attention(config: ModelConfig, prefix: str) -> SlotMap:
    parts = [f"{prefix}.{part}_proj.weight" for part in "qkvo"]
    if config.attention_bias:
        parts += [f"{prefix}.{part}_proj.bias" for part in "qkv"]
    if config.attention_out_bias:
        parts.append(f"{prefix}.o_proj.bias")
    if config.qk_norm != "none":
        parts += [f"{prefix}.q_norm.weight", f"{prefix}.k_norm.weight"]
    if config.attention_sinks:
        parts.append(f"{prefix}.sinks")
    return whole(*parts)


def _latent_attention(config: ModelConfig, prefix: str) -> SlotMap:
    parts = ["kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight"]
    if config.q_lora_rank:
        parts += ["q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight"]
    else:
        parts.append("q_proj.weight")
    if config.attention_bias:
        parts += ["kv_a_proj_with_mqa.bias"] + ["q_a_proj.bias"] * (config.q_lora_rank > 0)
    if config.attention_out_bias:
        parts.append("o_proj.bias")
    return whole(*(f"{prefix}.{part}" for part in parts))


def dense_mlp(config: ModelConfig, prefix: str) -> SlotMap:
    return swiglu(hf_names(prefix), ours(prefix), config.intermediate_size, config.mlp_bias)


def hf_names(prefix: str) -> tuple[str, str, str]:
    """Of gate, up and down."""
    return f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"


def swiglu(names: tuple[str, str, str], our_prefix: str, width: int, bias: bool) -> SlotMap:
    """A dense feed-forward whose gate, up and down are called so; ours has gate and up in one."""
    gate, up, down = names
    slots = {}
    for kind in ["weight"] + ["bias"] * bias:
        gate_up = f"{our_prefix}.gate_up.{kind}"
        slots[f"{gate}.{kind}"] = Slot(gate_up, part(slice(0, width)))
        slots[f"{up}.{kind}"] = Slot(gate_up, part(slice(width, 2 * width)))
        slots[f"{down}.{kind}"] = Slot(f"{our_prefix}.down.{kind}")
    return slots


def sparse_mlp(config: ModelConfig, prefix: str) -> SlotMap:
    """Router, experts and shared experts as Qwen, GLM and DeepSeek publish them."""
    mlp = ours(prefix)
    slots = {f"{prefix}.gate.weight": Slot(f"{mlp}.router.weight")}
    if config.router == "sigmoid":
        slots[f"{prefix}.gate.e_score_correction_bias"] = Slot(f"{mlp}.router.bias")
    slots |= experts(config, prefix, "gate_proj", "up_proj", "down_proj")
    if config.shared_width:
        shared = f"{mlp}.shared_experts"
        slots |= swiglu(hf_names(f"{prefix}.shared_experts"), shared, config.shared_width, config.mlp_bias)
    return slots


def experts(config: ModelConfig, prefix: str, gate: str, up: str, down: str) -> SlotMap:
    """One matrix a projection and expert, under the family's names."""
    mlp, F, slots = ours(prefix), config.moe_intermediate_size, {}
    for e in range(config.num_experts):
        expert, gate_up = f"{prefix}.experts.{e}", f"{mlp}.experts.gate_up"
        slots[f"{expert}.{gate}.weight"] = Slot(gate_up, part(e, slice(0, F)))
        slots[f"{expert}.{up}.weight"] = Slot(gate_up, part(e, slice(F, 2 * F)))
        slots[f"{expert}.{down}.weight"] = Slot(f"{mlp}.experts.down", part(e))
    return slots


def is_redundant(config: ModelConfig, name: str, _: Collection[str] = ()) -> bool:
    """Tensors that published checkpoints may hold and the model does not need."""
    tied_head = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_head or name.endswith("rotary_emb.inv_freq")


def in_predictor(config: ModelConfig, name: str, names: Collection[str]) -> bool:
    """Of the module after the last layer, which `eh_proj` tells from a layer that the config leaves out."""
    after_last = f"model.layers.{config.num_hidden_layers}."
    return name.startswith(after_last) and f"{after_last}eh_proj.weight" in names


def as_it_is(config: AnyConfig, _: Collection[str]) -> AnyConfig:
    return config


@dataclass(frozen=True)
class Family:
    """One published architecture: which configs it can hold, and how it writes them down.

    Functions take the family's own kind of config, a ModelConfig but for encoder-decoders.
    """

    model_type: str
    architecture: str
    options: frozenset[str]
    """Config fields that it has beyond `SHARED`; all others must be at their defaults."""
    suits: Callable[[ModelConfig], bool]
    """What those fields must add up to."""
    to_hf: Callable[[Any], dict[str, Any]]
    """The contents of config.json."""
    from_hf: Callable[[dict[str, Any], str], AnyConfig]
    """The reverse; a TenfoldError names the source and what tenfold does not model."""
    tensor_map: Callable[[Any], SlotMap] = tensor_map
    is_redundant: Callable[[Any, str, Collection[str]], bool] = is_redundant
    """Whether the model does not need a tensor, of a file that holds all of these names."""
    present: Callable[[Any, Collection[str]], AnyConfig] = as_it_is
    """The config less the optional modules that these tensor names leave out."""

    def fits(self, config: ModelConfig) -> bool:
        """Whether transformers would compute the same function."""
        return changed(config) <= SHARED | self.options and self.suits(config)


SHARED = frozenset(
    {
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rope_theta", "rope_scaling", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
        "qk_norm",  # its default is no family's rule: each says what it wants
    }
)  # fmt: skip
EXPERTS = frozenset(
    {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "router", "norm_topk_prob"}
)
SOME_LAYERS = frozenset({"mlp_only_layers", "decoder_sparse_step"})
WINDOW = frozenset({"sliding_window", "layer_types"})
BIASES = frozenset({"attention_bias", "attention_out_bias"})


def changed(config: ModelConfig) -> frozenset[str]:
    """Fields that are not at their defaults and do something."""
    idle = {"capacity_factor"} if config.router != "switch" else set()
    if not config.is_sparse:
        idle |= EXPERTS | SOME_LAYERS | {"n_group", "topk_group", "routed_scaling_factor"}
    fields = ModelConfig.model_fields.items()
    return frozenset(name for name, f in fields if name not in idle and getattr(config, name) != f.default)


def renormalizes(config: ModelConfig) -> bool:
    """Whether the chosen experts' weights sum to one; a softmax over the top-k always does."""
    return config.norm_topk_prob or config.router == "topk_softmax"


def routes_by_softmax(config: ModelConfig) -> bool:
    return config.is_sparse and config.router in ("softmax", "topk_softmax")


def all_sparse(config: ModelConfig) -> bool:
    return len(config.sparse_layers) == config.num_hidden_layers


def has_even_heads(config: ModelConfig) -> bool:
    """For families without a head_dim of their own."""
    return config.hidden_size == config.num_attention_heads * config.head_dim


def shares_out_evenly(config: ModelConfig) -> bool:
    """For families whose width transformers wants to be a multiple of the heads, head_dim or not."""
    return config.hidden_size % config.num_attention_heads == 0


def biases_all_or_none(config: ModelConfig) -> bool:
    """For families whose `attention_bias` is on q, k, v and the output alike."""
    return config.attention_bias == config.attention_out_bias


def slides_everywhere_or_nowhere(config: ModelConfig) -> bool:
    """For families whose `sliding_window` holds in every layer."""
    return len({config.window(layer) for layer in range(config.num_hidden_layers)}) == 1


def hf_fields(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """Fields that every decoder-only family has under the same name."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = {}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling.model_dump(exclude_none=True, exclude_unset=True)
        scaling = {"rope_scaling": {**rope, "type": rope["rope_type"]}}  # for older engines
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
        **scaling,
        "rope_parameters": rope,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "hidden_act": "silu",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def layer_types(slides: list[bool]) -> list[str]:
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]


def written_window(config: ModelConfig) -> dict[str, Any]:
    """Layer by layer, for families that may slide in some."""
    slides = [config.window(layer) is not None for layer in range(config.num_hidden_layers)]
    return {
        "use_sliding_window": any(slides),
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(slides),
    }


WINDOW_LEFT_OUT = 4096
"""`sliding_window` of a Mistral or Qwen config without the field, as in transformers; null is none."""

_NO_SCALING = ("type", "rope_theta", "partial_rotary_factor")
"""Keys of a rope dictionary that describe no scaling."""


class HfReader:
    """A config.json being read: takes fields, and refuses values tenfold does not model."""

    def __init__(self, raw: dict[str, Any], source: str):
        self.raw = raw
        self.source = source
        self.only("hidden_act", "silu")
        self.only("is_causal", True)
        weight_block_size(raw, source)  # refuses other ways to quantise
        parameters, scaling = self._rope_dict("rope_parameters"), self._rope_dict("rope_scaling")
        self.rope = scaling or parameters  # the older name counts where both are there, as in transformers

    def fail(self, name: str, accepted: str) -> NoReturn:
        given = self.raw.get(name)
        raise TenfoldError(f"{self.source}: {name} {given!r:.100} is not supported, only {accepted}")

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

    def count(self, name: str, least: int = 0, default: int | None = None) -> int:
        """A whole number that is needed before the config can be validated."""
        if default is not None and self.raw.get(name) is None:
            return default
        value = self.need(name)
        if type(value) is not int or value < least:
            self.fail(name, f"a whole number of at least {least}")
        return value

    def layers(self) -> range:
        """Of `num_hidden_layers`, to be looped over before the config is validated."""
        count = self.count("num_hidden_layers")
        if count > MAX_LAYERS:
            self.fail("num_hidden_layers", f"up to {MAX_LAYERS:,}")
        return range(count)

    def layer_types(self, otherwise: Callable[[int], bool]) -> list[str]:
        """As listed, or by which layers slide."""
        listed = self.raw.get("layer_types") or layer_types([otherwise(layer) for layer in self.layers()])
        if not isinstance(listed, list):
            self.fail("layer_types", "a list")
        return listed

    def head_dim(self) -> int:
        """As written, or the heads' even share of the width."""
        share = self.count("hidden_size") // self.count("num_attention_heads", least=1)
        return self.raw.get("head_dim") or share

    def heads(self) -> dict[str, Any]:
        """Attention heads, where every one has its own key may go unsaid."""
        kv_heads = self.raw.get("num_key_value_heads") or self.need("num_attention_heads")
        return {"num_key_value_heads": kv_heads, "head_dim": self.head_dim()}

    def biases(self, default: bool = False) -> dict[str, Any]:
        """For families whose `attention_bias` is on q, k, v and the output alike."""
        biased = self.raw.get("attention_bias", default)
        return {"attention_bias": biased, "attention_out_bias": biased}

    def no_head_dim(self) -> int:
        """The heads' even share, for families that have no head_dim: another value is refused."""
        share = self.count("hidden_size") // self.count("num_attention_heads", least=1)
        self.only("head_dim", share)
        return share

    def optional_window(self, slides: Callable[[int, int], bool]) -> dict[str, Any]:
        """`sliding_window` where `use_sliding_window` switches it on (Qwen).

        `slides(layer, max_window_layers)` says in which layers, where `layer_types` does not.
        """
        window = self.raw.get("sliding_window", WINDOW_LEFT_OUT)
        if not self.raw.get("use_sliding_window") or window is None:
            return {}
        first = self.count("max_window_layers", default=28)
        listed = self.layer_types(lambda layer: slides(layer, first))
        if "sliding_attention" not in listed:
            return {}
        return {"sliding_window": window, "layer_types": tuple(listed)}

    def build(self, **fields: Any) -> ModelConfig:
        """The shared fields and the family's own, validated."""
        raw = self.raw
        shared = {
            name: self.need(name)
            for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "rms_norm_eps",
            )
        }  # fmt: skip
        eos = raw.get("eos_token_id")
        shared |= {
            "rope_theta": self.rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            "rope_scaling": self._scaling(),
            "initializer_range": raw.get("initializer_range", 0.02),
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "bos_token_id": raw.get("bos_token_id"),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "pad_token_id": raw.get("pad_token_id"),
        }
        return ModelConfig.parse(shared | self.heads() | fields, self.source)

    def _scaling(self) -> dict[str, Any] | None:
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind == "default":
            return None
        scaling = {name: value for name, value in self.rope.items() if name not in _NO_SCALING}
        if kind != "linear" and scaling.get("original_max_position_embeddings") is None:
            scaling["original_max_position_embeddings"] = self.need("max_position_embeddings")
        return scaling | {"rope_type": kind}

    def _rope_dict(self, name: str) -> dict[str, Any]:
        rope = self.raw.get(name) or {}
        known = {*RopeScaling.model_fields, *_NO_SCALING}
        kinds = ("default", *get_args(RopeScaling.model_fields["rope_type"].annotation))
        if not isinstance(rope, dict) or not rope.keys() <= known:
            self.fail(name, f"an object with some of {', '.join(sorted(known))}")
        if rope.get("rope_type", rope.get("type", "default")) not in kinds:
            self.fail(name, f"rope_type {', '.join(kinds)}")
        return rope
