"""Switch Transformers (arXiv:2101.03961): T5's encoder-decoder with top-1 experts."""

from collections.abc import Collection
from typing import Any

from tenfold.checkpoint.families.common import Family, HfReader
from tenfold.checkpoint.slot import Slot, SlotMap, part
from tenfold.switch_config import SwitchConfig

MODEL_TYPE, ARCHITECTURE = "switch_transformers", "SwitchTransformersForConditionalGeneration"

_NEEDED = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "num_experts", "expert_capacity",
)  # fmt: skip
_OPTIONAL = (
    "router_bias", "relative_attention_num_buckets", "relative_attention_max_distance",
    "layer_norm_epsilon", "tie_word_embeddings",
)  # fmt: skip


def to_hf(config: SwitchConfig) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        **config.model_dump(mode="json"),
        "num_sparse_encoder_layers": len(config.encoder_sparse_layers),
        "num_sparse_decoder_layers": len(config.decoder_sparse_layers),
        "is_encoder_decoder": True,
        "dense_act_fn": "relu",
        "router_dtype": "float32",
        # tenfold applies neither.
        "dropout_rate": 0.0,
        "router_jitter_noise": 0.0,
    }


def from_hf(raw: dict[str, Any], source: str) -> SwitchConfig:
    if raw.get("num_decoder_layers") is None:
        raw = {**raw, "num_decoder_layers": raw.get("num_layers")}
    reader = HfReader(raw, source)
    reader.only("is_encoder_decoder", True)
    reader.only("dense_act_fn", "relu")
    reader.only("feed_forward_proj", "relu")
    reader.only("router_dtype", "float32")
    fields = {name: reader.need(name) for name in _NEEDED}
    fields |= {name: raw[name] for name in _OPTIONAL if raw.get(name) is not None}
    eos, pad = raw.get("eos_token_id", 1), raw.get("pad_token_id", 0)
    starts = (raw.get("decoder_start_token_id"), raw.get("bos_token_id"), pad, 0)
    return SwitchConfig.parse(
        {
            **fields,
            "encoder_sparse_step": _sparse_step(reader, "encoder", "num_layers"),
            "decoder_sparse_step": _sparse_step(reader, "decoder", "num_decoder_layers"),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "pad_token_id": pad,
            "decoder_start_token_id": next(start for start in starts if start is not None),
        },
        source,
    )


def _sparse_step(reader: HfReader, stack: str, num_layers: str) -> Any:
    """As written, or from the number of sparse layers as transformers derives it.

    None at all it makes a step of all layers, so that the second layer is sparse all the same.
    """
    name, sparse = f"{stack}_sparse_step", f"num_sparse_{stack}_layers"
    if reader.raw.get(name) is not None or reader.raw.get(sparse) is None:
        return reader.need(name, sparse)
    layers = reader.count(num_layers, least=1)
    return layers // (reader.count(sparse) or 1)


def tensor_map(config: SwitchConfig) -> SlotMap:
    return _embeddings(config) | _stack(config, "encoder") | _stack(config, "decoder")


def _embeddings(config: SwitchConfig) -> SlotMap:
    """Untied, transformers keeps a shared embedding in the file that nothing reads."""
    first = "encoder.embed_tokens.weight"
    if config.tie_word_embeddings:
        return {"shared.weight": Slot(first)}
    own = (first, "decoder.embed_tokens.weight", "lm_head.weight")
    return {"shared.weight": Slot(first, is_copy=True)} | {name: Slot(name) for name in own}


def _stack(config: SwitchConfig, stack: str) -> SlotMap:
    decoder = stack == "decoder"
    sparse = config.decoder_sparse_layers if decoder else config.encoder_sparse_layers
    norm, table = f"{stack}.final_layer_norm.weight", "relative_attention_bias.weight"
    slots = {norm: Slot(norm), f"{stack}.block.0.layer.0.SelfAttention.{table}": Slot(f"{stack}.{table}")}
    for n in range(config.num_decoder_layers if decoder else config.num_layers):
        ours = f"{stack}.block.{n}"
        parts = {"self_attn": "SelfAttention"} | ({"cross_attn": "EncDecAttention"} if decoder else {})
        for number, (name, theirs) in enumerate(parts.items()):
            layer = f"{ours}.layer.{number}"
            slots |= {f"{layer}.{theirs}.{p}.weight": Slot(f"{ours}.{name}.{p}.weight") for p in "qkvo"}
            slots[f"{layer}.layer_norm.weight"] = Slot(f"{ours}.{name}_norm.weight")
        layer = f"{ours}.layer.{len(parts)}"
        slots[f"{layer}.layer_norm.weight"] = Slot(f"{ours}.mlp_norm.weight")
        slots |= (_sparse_mlp if n in sparse else _dense_mlp)(config, f"{layer}.mlp", f"{ours}.mlp")
    return slots


def _dense_mlp(_: SwitchConfig, theirs: str, ours: str) -> SlotMap:
    return {f"{theirs}.{name}.weight": Slot(f"{ours}.{name}.weight") for name in ("wi", "wo")}


def _sparse_mlp(config: SwitchConfig, theirs: str, ours: str) -> SlotMap:
    slots = {
        f"{theirs}.router.classifier.{kind}": Slot(f"{ours}.router.{kind}")
        for kind in ["weight"] + ["bias"] * config.router_bias
    }
    for e in range(config.num_experts):
        for name in ("wi", "wo"):
            slots[f"{theirs}.experts.expert_{e}.{name}.weight"] = Slot(f"{ours}.experts.{name}", part(e))
    return slots


def is_redundant(config: SwitchConfig, name: str, _: Collection[str]) -> bool:
    """Copies of the tied embedding, and a table of old checkpoints that cross-attention never used."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    tied_copy = config.tie_word_embeddings and name in copies
    return tied_copy or name.endswith(".EncDecAttention.relative_attention_bias.weight")


SWITCH = Family(
    model_type=MODEL_TYPE,
    architecture=ARCHITECTURE,
    options=frozenset(),
    suits=lambda _: False,  # no ModelConfig: it has a config of its own
    to_hf=to_hf,
    from_hf=from_hf,
    tensor_map=tensor_map,
    is_redundant=is_redundant,
)
