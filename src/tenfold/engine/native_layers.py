"""A packed model's decoder layers in the form the compiled kernels take: one object a layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tenfold import compiled
from tenfold.config import MLA_NORM_EPS, ModelConfig
from tenfold.engine.latent import folded
from tenfold.kernels import native
from tenfold.model.rope import rope_tables, score_scale
from tenfold.packed import PackedExperts, PackedMatrix, StreamedExperts

CHOICES = ("softmax", "topk_softmax", "sigmoid")
"""In csrc/router.hpp's order."""


class NativeLayers:
    """`layers[n]`, a `Layer` of csrc/module.cpp.

    Holds every tensor whose address the layers know.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Any], capacity: int):
        self._config, self._weights = config, weights
        self._kept: list[Tensor] = []
        cos, sin = rope_tables(config, torch.arange(capacity))
        self._cos, self._sin = self._keep(cos), self._keep(sin)
        self.layers = [self._layer(n) for n in range(config.num_hidden_layers)]

    def _layer(self, n: int) -> Any:
        config, prefix = self._config, f"layers.{n}."
        return compiled.module().Layer(
            attention=None if config.is_latent else self._attention(prefix + "self_attn.", config.window(n)),
            latent=self._latent(prefix + "self_attn.", config.window(n)) if config.is_latent else None,
            feed_forward=self._feed_forward(prefix + "mlp.", n in config.sparse_layers),
            input_norm=self.address(prefix + "input_layernorm.weight"),
            post_norm=self.address(prefix + "post_attention_layernorm.weight"),
            eps=config.rms_norm_eps,
            residual=config.residual_multiplier,
            hidden=config.hidden_size,
            cos=self._cos,
            sin=self._sin,
            rotary_dim=config.rotary_dim,
            interleave=config.rope_interleave,
        )

    def _attention(self, prefix: str, window: int | None) -> Any:
        config = self._config
        projections = {name: self.linear(f"{prefix}{name}_proj") for name in "qkvo"}
        return compiled.module().Attention(
            **projections,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=score_scale(config),
            window=window or 0,
            sinks=self.address(prefix + "sinks"),
            q_norm=self.address(prefix + "q_norm.weight"),
            k_norm=self.address(prefix + "k_norm.weight"),
            norm_per_head=config.qk_norm == "head",
            eps=config.rms_norm_eps,
        )

    def _latent(self, prefix: str, window: int | None) -> Any:
        config = self._config
        kv_b = self._weights[f"{prefix}kv_b_proj.weight"]
        assert isinstance(kv_b, PackedMatrix)
        key_up, value_up = halves = folded(kv_b, config)
        self._kept.extend(halves)
        return compiled.module().LatentAttention(
            q_a=self.linear(f"{prefix}q_a_proj") if config.q_lora_rank else None,
            q_a_norm=self.address(prefix + "q_a_layernorm.weight"),
            q=self.linear(prefix + ("q_b_proj" if config.q_lora_rank else "q_proj")),
            kv_a=self.linear(prefix + "kv_a_proj_with_mqa"),
            kv_a_norm=self.address(prefix + "kv_a_layernorm.weight"),
            key_up=key_up.data_ptr(),
            value_up=value_up.data_ptr(),
            o=self.linear(prefix + "o_proj"),
            heads=config.num_attention_heads,
            rank=config.kv_lora_rank,
            plain=config.qk_nope_head_dim,
            rotary=config.qk_rope_head_dim,
            value=config.v_head_dim,
            scale=score_scale(config),
            window=window or 0,
            eps=MLA_NORM_EPS,
        )

    def _feed_forward(self, prefix: str, sparse: bool) -> Any:
        dense = f"{prefix}shared_experts." if sparse else prefix
        has_dense = f"{dense}gate_up.weight" in self._weights
        return compiled.module().FeedForward(
            gate_up=self.linear(f"{dense}gate_up") if has_dense else None,
            down=self.linear(f"{dense}down") if has_dense else None,
            gate=self.address(prefix + "shared_expert_gate.weight"),
            router=self.router(prefix + "router.") if sparse else None,
            experts=self._experts(prefix + "experts") if sparse else None,
        )

    def router(self, prefix: str) -> Any:
        """The compiled form of the router whose weights' names begin with `prefix`."""
        config = self._config
        as_switch = config.router == "switch"  # top-1 of a softmax, by its own probability
        weight = self._weights[prefix + "weight"]
        assert isinstance(weight, Tensor)
        half = weight.bfloat16().contiguous()
        in_bf16 = bool((half.float() == weight).all())  # then it is half the bytes of the same numbers
        self._kept.append(half)
        return compiled.module().Router(
            weight=half.data_ptr() if in_bf16 else self.address(prefix + "weight"),
            in_bf16=in_bf16,
            experts=config.num_experts,
            hidden=config.hidden_size,
            top_k=config.num_experts_per_tok,
            choice=CHOICES.index("softmax" if as_switch else config.router),
            logit_bias=self.address(prefix + "logit_bias"),
            selection_bias=self.address(prefix + "bias"),
            renormalise=config.router == "topk_softmax" or (config.norm_topk_prob and not as_switch),
            groups=config.n_group if config.router in ("softmax", "sigmoid") else 1,
            top_groups=config.topk_group,
            scale=1.0 if as_switch else config.routed_scaling_factor,
        )

    def _experts(self, name: str) -> Any:
        packed = self._weights[name]
        assert isinstance(packed, PackedExperts | StreamedExperts)
        biases = [self._floats(f"{name}.{bias}") for bias in ("gate_up_bias", "down_bias")]
        return native.new_experts(packed, self._config.hidden_act, *biases)

    def linear(self, name: str) -> Any:
        """The compiled form of a matrix, with its bias where there is one."""
        matrix = self._weights[f"{name}.weight"]
        assert isinstance(matrix, PackedMatrix)
        return native.new_linear(matrix, self._floats(f"{name}.bias"))

    def address(self, name: str) -> int:
        """Of a tensor in float32; 0 where the model has none of that name."""
        return native.address(self._floats(name))

    def _floats(self, name: str) -> Tensor | None:
        weight = self._weights.get(name)
        if weight is None:
            return None
        assert isinstance(weight, Tensor)
        self._keep(floats := weight.float().contiguous())
        return floats

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return native.address(tensor)
