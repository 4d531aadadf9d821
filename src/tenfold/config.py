"""What a model is, and the arithmetic on it: parameters, FLOPs and bytes, all exact.

Field names are those of Hugging Face's config.json. Nothing here needs torch.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from tenfold.config_checks import problems
from tenfold.counting import BYTES_PER_WEIGHT, Counted, ParamCounts
from tenfold.errors import TenfoldError
from tenfold.parsed import MAX_LAYERS, Parsed

RouterName = Literal["softmax", "topk_softmax", "sigmoid", "switch", "expert_choice"]
LayerType = Literal["full_attention", "sliding_attention"]
MLA_NORM_EPS = 1e-6
"""Of the two norms inside latent attention, whatever `rms_norm_eps` is (DeepSeek's own code)."""


class RopeScaling(Parsed):
    """How RoPE is stretched beyond the context it was trained for; fields as in Hugging Face.

    `linear` divides every frequency by `factor`; `llama3` only the low ones (Llama 3.1's config);
    `yarn` by parts, and sharpens attention (Peng et al. 2023, arXiv:2309.00071).
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0)
    original_max_position_embeddings: int | None = Field(None, gt=0)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rope_type != "linear" and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type {self.rope_type} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be more than low_freq_factor")
        return self


class ModelConfig(Counted, Parsed):
    """A decoder-only transformer, dense (`num_experts` 0) or sparse."""

    model_type: str | None = Field(
        None, description="Hugging Face family to save as; by default the first that fits"
    )
    vocab_size: int = Field(2048, gt=0)
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(384, ge=0, description="width of a dense layer's SwiGLU")
    num_hidden_layers: int = Field(4, gt=0, le=MAX_LAYERS)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(4, gt=0)
    head_dim: int = Field(32, gt=0)
    max_position_embeddings: int = Field(2048, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = Field(False, description="RoPE turns neighbours, not halves (DeepSeek)")
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = Field(None, ge=0, description="token that begins a text")
    eos_token_id: int | tuple[int, ...] | None = Field(None, description="token or tokens that end a text")
    pad_token_id: int | None = Field(None, description="token that fills up a batch")

    attention_bias: bool = Field(False, description="biases on q, k and v (latent attention: q_a and kv_a)")
    attention_out_bias: bool = Field(False, description="bias on the output projection of attention")
    attention_sinks: bool = Field(False, description="a learned logit per head that takes weight (gpt-oss)")
    attention_multiplier: float | None = Field(
        None, gt=0, description="scale of q·k; by default one over the root of the head's width"
    )
    sliding_window: int | None = Field(None, gt=0, description="positions a sliding layer looks back")
    layer_types: tuple[LayerType, ...] = Field(
        (), description="one a layer; empty is all sliding where sliding_window is set, else all full"
    )
    kv_lora_rank: int = Field(0, ge=0, description="width of MLA's compressed latent; 0 is GQA")
    q_lora_rank: int = Field(0, ge=0, description="MLA: width of the compressed query; 0 is direct")
    qk_nope_head_dim: int = Field(0, ge=0, description="MLA: dimensions of a head without RoPE")
    qk_rope_head_dim: int = Field(0, ge=0, description="MLA: dimensions of a head with RoPE")
    v_head_dim: int = Field(0, ge=0, description="MLA: width of a head's value")
    qk_norm: Literal["none", "head", "full"] = Field(
        "head", description="RMSNorm on q and k: per head (Qwen3) or over all heads (OLMoE)"
    )

    embedding_multiplier: float = Field(1.0, gt=0, description="Granite")
    residual_multiplier: float = Field(1.0, gt=0, description="Granite: of what a block adds")
    logits_scaling: float = Field(1.0, gt=0, description="Granite: divides the logits")
    hidden_act: Literal["silu", "clamped_swiglu"] = Field(
        "silu", description="clamped_swiglu is gpt-oss's, in its experts"
    )
    mlp_bias: bool = Field(False, description="biases in dense layers and shared experts")
    num_nextn_predict_layers: int = Field(
        0, ge=0, le=1, description="multi-token-prediction modules (DeepSeek-V3)"
    )

    num_experts: int = Field(0, ge=0, description="routed experts in a sparse layer; 0 is dense")
    num_experts_per_tok: int = Field(0, ge=0, description="top-k")
    moe_intermediate_size: int = Field(0, ge=0, description="width of one expert's SwiGLU")
    n_shared_experts: int = Field(0, ge=0, description="experts that every token uses")
    shared_expert_intermediate_size: int = Field(
        0, ge=0, description="width of one shared expert, where it is not n_shared_experts experts"
    )
    shared_expert_gate: bool = Field(False, description="a sigmoid gate on the shared expert (Qwen2-MoE)")
    moe_bias: bool = Field(False, description="biases on the router and the experts (gpt-oss)")
    mlp_only_layers: tuple[int, ...] = Field((), max_length=MAX_LAYERS, description="layers that stay dense")
    decoder_sparse_step: int = Field(1, gt=0, description="every n-th layer is sparse")
    router: RouterName = "softmax"
    norm_topk_prob: bool = Field(True, description="the chosen experts' weights sum to one")
    n_group: int = Field(1, gt=0, description="groups that experts are chosen by")
    topk_group: int = Field(1, gt=0, description="groups a token may choose from")
    routed_scaling_factor: float = Field(1.0, gt=0)
    capacity_factor: float = Field(1.25, gt=0, description="Switch: room per expert over its fair share")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in problems(self):
            raise ValueError(problem)
        return self

    @property
    def is_sparse(self) -> bool:
        return bool(self.sparse_layers)

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers with experts (Qwen3-MoE's rule: every n-th, less `mlp_only_layers`)."""
        if not self.num_experts:
            return []
        dense = set(self.mlp_only_layers)
        return [
            layer
            for layer in range(self.num_hidden_layers)
            if (layer + 1) % self.decoder_sparse_step == 0 and layer not in dense
        ]

    def check_generates(self) -> None:
        """Raises TenfoldError for a model that trains but cannot generate."""
        if self.is_sparse and self.router == "expert_choice":
            raise TenfoldError(
                "router expert_choice cannot generate: its experts choose among tokens of the future;"
                " train with another router to generate"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent attention (MLA)."""
        return self.kv_lora_rank > 0

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together, which are one SwiGLU."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def window(self, layer: int) -> int | None:
        """Positions that a layer's attention looks back, its own included; None is all of them."""
        full = bool(self.layer_types) and self.layer_types[layer] == "full_attention"
        return None if full else self.sliding_window

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert, without biases."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def qk_width(self) -> int:
        """Dimensions of all query heads, as they meet the keys."""
        return self.num_attention_heads * (self.qk_nope_head_dim + self.head_dim)

    @property
    def value_width(self) -> int:
        """Dimensions of all heads' outputs."""
        return self.num_attention_heads * (self.v_head_dim or self.head_dim)

    def params(self) -> ParamCounts:
        """Parameters by kind; a tied embedding is counted once, as the embedding."""
        D, V, L, E = self.hidden_size, self.vocab_size, self.num_hidden_layers, self.num_experts
        sparse = len(self.sparse_layers)
        return ParamCounts(
            embedding=V * D,
            lm_head=0 if self.tie_word_embeddings else V * D,
            attention=L * self._attention_weights(),
            norms=L * (2 * D + self._attention_norms()) + D,
            dense_mlp=(L - sparse) * 3 * D * self.intermediate_size,
            shared_experts=sparse * (3 * D * self.shared_width + D * self.shared_expert_gate),
            router=sparse * E * (D + self._router_biases()),
            experts=sparse * E * self.expert_params,
            biases=self._biases(),
        )

    def _attention_weights(self) -> int:
        """Of one layer's matrices."""
        D, H = self.hidden_size, self.num_attention_heads
        out = self.value_width * D
        if not self.is_latent:
            return out + D * (self.qk_width + 2 * self.num_key_value_heads * self.head_dim)
        rank = self.q_lora_rank
        query = rank * (D + self.qk_width) if rank else D * self.qk_width
        down = D * (self.kv_lora_rank + self.qk_rope_head_dim)
        return out + query + down + self.kv_lora_rank * H * (self.qk_nope_head_dim + self.v_head_dim)

    def _attention_norms(self) -> int:
        if self.is_latent:
            return self.q_lora_rank + self.kv_lora_rank
        kv_dim = self.num_key_value_heads * self.head_dim
        return {"none": 0, "head": 2 * self.head_dim, "full": self.qk_width + kv_dim}[self.qk_norm]

    def _biases(self) -> int:
        D, L, E = self.hidden_size, self.num_hidden_layers, self.num_experts
        sparse = len(self.sparse_layers)
        inputs = self.qk_width + 2 * self.num_key_value_heads * self.head_dim
        if self.is_latent:
            inputs = self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim
        attention = inputs * self.attention_bias + D * self.attention_out_bias
        attention += self.num_attention_heads * self.attention_sinks
        shared = (2 * self.shared_width + D) * (self.shared_width > 0)
        dense = (L - sparse) * (2 * self.intermediate_size + D) + sparse * shared
        return L * attention + dense * self.mlp_bias + sparse * E * self.expert_biases

    def _router_biases(self) -> int:
        """Of one expert: added to its logit, or to its score for the selection alone."""
        return self.moe_bias + (self.router == "sigmoid")

    @property
    def expert_biases(self) -> int:
        """Of one routed expert."""
        return (2 * self.moe_intermediate_size + self.hidden_size) * self.moe_bias

    def idle_params(self) -> int:
        idle = self.num_experts - self.num_experts_per_tok
        return len(self.sparse_layers) * idle * (self.expert_params + self.expert_biases)

    def mtp_params(self) -> int:
        """Parameters of the multi-token-prediction module, which shares the embedding and the head."""
        if not self.num_nextn_predict_layers:
            return 0
        counts = self._one_layer().params()
        layer = counts.total - counts.embedding - counts.lm_head
        return layer + 2 * self.hidden_size + 2 * self.hidden_size**2

    def _one_layer(self) -> "ModelConfig":
        """The same with its last layer alone: what a multi-token-prediction module holds."""
        shape = {"num_hidden_layers": 1, "mlp_only_layers": (), "decoder_sparse_step": 1}
        return self.model_copy(update=shape | {"layer_types": (), "num_nextn_predict_layers": 0})

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token that attends to `context` positions, fewer in sliding layers.

        Two per weight of every matrix that multiplies it, and two per attended position and
        dimension of q·k and of p·v. Norms, activations and the softmax are left out, as is usual, and
        latent attention is counted with its keys and values made, as in training.
        """
        attended = sum(min(context, self.window(n) or context) for n in range(self.num_hidden_layers))
        return self._matrix_flops() + 2 * (self.qk_width + self.value_width) * attended

    def train_flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token: forward and twice that backward, at the mean causal context.

        With the module that predicts further ahead, and its use of the head.
        """
        attended = sum(
            _causal_pairs(seq_len, self.window(n) or seq_len) for n in range(self.num_hidden_layers)
        )
        attention = 2 * (self.qk_width + self.value_width) * attended // seq_len
        ahead = 0
        if self.num_nextn_predict_layers:
            ahead = self._one_layer().train_flops_per_token(seq_len) + 3 * 4 * self.hidden_size**2
        return 3 * (self._matrix_flops() + attention) + ahead

    def _matrix_flops(self) -> int:
        counts = self.params()
        idle = (self.num_experts - self.num_experts_per_tok) * self.expert_params * len(self.sparse_layers)
        looked_up = 0 if self.tie_word_embeddings else counts.embedding
        added = counts.norms + counts.biases
        added += len(self.sparse_layers) * self.num_experts * self._router_biases()
        return 2 * (counts.total - looked_up - added - idle)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes the KV cache grows by for each token; with MLA, of the compressed latent."""
        width = 2 * self.num_key_value_heads * self.head_dim
        if self.is_latent:
            width = self.kv_lora_rank + self.qk_rope_head_dim
        return width * self.num_hidden_layers * BYTES_PER_WEIGHT[dtype]

    def weights_per_token(self) -> int:
        """Weights one generated token reads: all that is active, but only one row of the embedding."""
        row = 0 if self.tie_word_embeddings else self.hidden_size
        return self.num_active_params(input_embedding=False) + row

    def dense_twin(self, equal: Literal["active", "total"]) -> "ModelConfig":
        """The dense model with the same active, or the same total, parameters (within 2%).

        Everything but the feed-forward layers stays as it is.
        Raises TenfoldError if no width comes within 2%.
        """
        wanted = self.num_active_params() if equal == "active" else self.num_params()
        counts = self.params()
        fixed = counts.embedding + counts.lm_head + counts.attention + counts.norms
        fixed += self.model_copy(update=_DENSE | {"intermediate_size": 0})._biases()
        per_width = (3 * self.hidden_size + 2 * self.mlp_bias) * self.num_hidden_layers
        width = max(1, round((wanted - fixed) / per_width))
        if abs((fixed + width * per_width) / wanted - 1) > 0.02:
            raise TenfoldError(
                f"no dense model of this shape has {wanted:,} parameters: the nearest"
                f" (intermediate_size {width}) has {fixed + width * per_width:,}"
            )
        shape = self.model_dump(exclude=_SPARSE_FIELDS | {"model_type", "intermediate_size"})
        return ModelConfig(**shape, intermediate_size=width)


_SPARSE_FIELDS = {
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts",
    "shared_expert_intermediate_size", "shared_expert_gate", "moe_bias", "hidden_act",
    "mlp_only_layers", "decoder_sparse_step", "router", "norm_topk_prob", "n_group",
    "topk_group", "routed_scaling_factor", "capacity_factor", "num_nextn_predict_layers",
}  # fmt: skip
_DENSE = {name: ModelConfig.model_fields[name].default for name in _SPARSE_FIELDS}


def _causal_pairs(seq_len: int, window: int) -> int:
    """Positions that all the tokens of a sequence attend to, added up."""
    window = min(window, seq_len)
    return window * (window + 1) // 2 + (seq_len - window) * window
