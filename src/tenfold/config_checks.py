"""Fields of a ModelConfig that contradict each other, in words."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tenfold.parsed import MAX_EXPERTS

if TYPE_CHECKING:
    from tenfold.config import ModelConfig


def problems(config: "ModelConfig") -> Iterator[str]:
    """Every contradiction, the plainest first."""
    yield from _attention_problems(config)
    if len(config.sparse_layers) < config.num_hidden_layers and not config.intermediate_size:
        yield "intermediate_size must be at least 1 where there are dense layers"
    if config.num_experts:
        yield from _expert_problems(config)
    elif config.num_experts_per_tok or config.moe_intermediate_size or config.shared_width:
        yield "num_experts is 0 (dense), so the other expert fields must be 0 too"


def _attention_problems(config: "ModelConfig") -> Iterator[str]:
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"num_attention_heads {config.num_attention_heads} is not a multiple of"
            f" num_key_value_heads {config.num_key_value_heads}"
        )
    if config.rotary_dim % 2 or config.rotary_dim == 0:
        yield (
            f"head_dim {config.head_dim} x partial_rotary_factor {config.partial_rotary_factor}"
            " must be an even number of at least 2"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "yarn" and config.rope_theta <= 1:
        yield f"rope_theta {config.rope_theta} must be more than 1 with rope_type yarn"
    if len(config.layer_types) not in (0, config.num_hidden_layers):
        yield (
            f"layer_types has {len(config.layer_types)} entries for"
            f" num_hidden_layers {config.num_hidden_layers}"
        )
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        yield "layer_types names sliding_attention, so sliding_window must be set"
    if config.is_latent:
        yield from _latent_problems(config)
    elif config.q_lora_rank or config.qk_nope_head_dim or config.qk_rope_head_dim or config.v_head_dim:
        yield "kv_lora_rank is 0 (no latent attention), so its other fields must be 0 too"


def _latent_problems(config: "ModelConfig") -> Iterator[str]:
    for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if not getattr(config, name):
            yield f"{name} must be at least 1 with latent attention (kv_lora_rank)"
    if config.head_dim != config.qk_rope_head_dim or config.partial_rotary_factor != 1:
        yield f"head_dim {config.head_dim} must be qk_rope_head_dim {config.qk_rope_head_dim} (MLA)"
    if config.num_key_value_heads != config.num_attention_heads:
        yield "num_key_value_heads must equal num_attention_heads with latent attention"
    if config.qk_norm != "none" or config.attention_sinks:
        yield "latent attention (kv_lora_rank) has no qk_norm and no attention_sinks"


def _expert_problems(config: "ModelConfig") -> Iterator[str]:
    E, K = config.num_experts, config.num_experts_per_tok
    if len(config.sparse_layers) * E > MAX_EXPERTS:
        yield f"num_experts {E} in {len(config.sparse_layers)} layers is more than any model has"
    if not 1 <= K <= E:
        yield f"num_experts_per_tok {K} must be from 1 to num_experts {E}"
    if not config.moe_intermediate_size:
        yield "moe_intermediate_size must be at least 1 in a sparse model"
    if any(not 0 <= layer < config.num_hidden_layers for layer in config.mlp_only_layers):
        yield f"mlp_only_layers {list(config.mlp_only_layers)} names a layer that is not there"
    if config.router == "switch" and K != 1:
        yield f"router switch is top-1, so num_experts_per_tok must be 1, not {K}"
    if config.router in ("switch", "expert_choice") and config.routed_scaling_factor != 1:
        yield f"router {config.router} has no routed_scaling_factor: leave it at 1"
    if config.n_shared_experts and config.shared_expert_intermediate_size:
        yield "n_shared_experts and shared_expert_intermediate_size are two ways to say one thing: set one"
    if config.shared_expert_gate and not config.shared_width:
        yield "shared_expert_gate needs a shared expert"
    other_mlps = config.shared_width or len(config.sparse_layers) < config.num_hidden_layers
    if config.hidden_act != "silu" and other_mlps:
        yield f"hidden_act {config.hidden_act} is for experts alone: no dense layers, no shared experts"
    if config.n_group > 1 or config.topk_group > 1:
        yield from _group_problems(config)


def _group_problems(config: "ModelConfig") -> Iterator[str]:
    E, K = config.num_experts, config.num_experts_per_tok
    ranked_by = {"sigmoid": 2, "softmax": 1}  # experts of a group that decide its rank
    if config.router not in ranked_by:
        yield f"n_group and topk_group need router sigmoid or softmax, not {config.router}"
    elif E % config.n_group or E // config.n_group < ranked_by[config.router]:
        least = ranked_by[config.router]
        yield f"n_group {config.n_group} must cut num_experts {E} into groups of {least} or more"
    elif config.topk_group > config.n_group:
        yield f"topk_group {config.topk_group} is more than n_group {config.n_group}"
    elif E // config.n_group * config.topk_group < K:
        yield f"{config.topk_group} groups hold fewer than num_experts_per_tok {K} experts"
