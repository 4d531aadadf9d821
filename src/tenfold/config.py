"""What a model is, and the arithmetic on it: parameters, FLOPs and bytes, all exact.

Field names are those of Hugging Face's config.json. Nothing here needs torch.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tenfold.errors import TenfoldError, nearest

BYTES_PER_WEIGHT = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}

RouterName = Literal["softmax", "topk_softmax", "sigmoid", "switch", "expert_choice"]


@dataclass(frozen=True)
class ParamCounts:
    """Parameters by what they do. `experts` counts all routed experts, used or not."""

    embedding: int
    lm_head: int
    attention: int
    norms: int
    dense_mlp: int
    shared_experts: int
    router: int
    experts: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


class ModelConfig(BaseModel):
    """A decoder-only transformer, dense (`num_experts` 0) or sparse."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str | None = Field(
        None, description="Hugging Face family to save as; by default the first that fits"
    )
    vocab_size: int = Field(2048, gt=0)
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(384, ge=0, description="width of a dense layer's SwiGLU")
    num_hidden_layers: int = Field(4, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(4, gt=0)
    head_dim: int = Field(32, gt=0)
    max_position_embeddings: int = Field(2048, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    tie_word_embeddings: bool = False
    eos_token_id: int | None = Field(None, ge=0, description="token that ends a text")
    attention_bias: bool = Field(False, description="biases on the q, k and v projections")
    qk_norm: Literal["none", "head", "full"] = Field(
        "head", description="RMSNorm on q and k: per head (Qwen3) or over all heads (OLMoE)"
    )

    num_experts: int = Field(0, ge=0, description="routed experts in a sparse layer; 0 is dense")
    num_experts_per_tok: int = Field(0, ge=0, description="top-k")
    moe_intermediate_size: int = Field(0, ge=0, description="width of one expert's SwiGLU")
    n_shared_experts: int = Field(0, ge=0, description="experts that every token uses")
    mlp_only_layers: tuple[int, ...] = Field((), description="layers that stay dense")
    decoder_sparse_step: int = Field(1, gt=0, description="every n-th layer is sparse")
    router: RouterName = "softmax"
    norm_topk_prob: bool = Field(True, description="the chosen experts' weights sum to one")
    n_group: int = Field(1, gt=0, description="expert groups of a sigmoid router")
    topk_group: int = Field(1, gt=0, description="groups a token may choose from")
    routed_scaling_factor: float = Field(1.0, gt=0)
    capacity_factor: float = Field(1.25, gt=0, description="Switch: room per expert over its fair share")

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Build from outside data; a TenfoldError names `source`, the field and what is accepted."""
        for name in values:
            if name not in cls.model_fields:
                raise TenfoldError(f"{source}: unknown field {name}{nearest(name, cls.model_fields)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise TenfoldError(f"{source}: {first_problem(error)}") from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> list[str]:
        """Contradictions between fields, in words."""
        E, K = self.num_experts, self.num_experts_per_tok
        found = []
        if self.num_attention_heads % self.num_key_value_heads:
            found.append(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            found.append(
                f"head_dim {self.head_dim} x partial_rotary_factor {self.partial_rotary_factor}"
                " must be an even number of at least 2"
            )
        if len(self.sparse_layers) < self.num_hidden_layers and not self.intermediate_size:
            found.append("intermediate_size must be at least 1 where there are dense layers")
        if not E:
            if K or self.moe_intermediate_size or self.n_shared_experts:
                found.append("num_experts is 0 (dense), so the other expert fields must be 0 too")
            return found
        if not 1 <= K <= E:
            found.append(f"num_experts_per_tok {K} must be from 1 to num_experts {E}")
        if not self.moe_intermediate_size:
            found.append("moe_intermediate_size must be at least 1 in a sparse model")
        if any(not 0 <= layer < self.num_hidden_layers for layer in self.mlp_only_layers):
            found.append(f"mlp_only_layers {list(self.mlp_only_layers)} names a layer that is not there")
        if self.router == "switch" and K != 1:
            found.append(f"router switch is top-1, so num_experts_per_tok must be 1, not {K}")
        if self.router in ("switch", "expert_choice") and self.routed_scaling_factor != 1:
            found.append(f"router {self.router} has no routed_scaling_factor: leave it at 1")
        if self.n_group > 1 or self.topk_group > 1:
            found.extend(self._group_problems())
        return found

    def _group_problems(self) -> list[str]:
        E, K = self.num_experts, self.num_experts_per_tok
        if self.router != "sigmoid":
            return [f"n_group and topk_group need router sigmoid, not {self.router}"]
        if E % self.n_group or E // self.n_group < 2:
            return [f"n_group {self.n_group} must cut num_experts {E} into groups of 2 or more"]
        if self.topk_group > self.n_group:
            return [f"topk_group {self.topk_group} is more than n_group {self.n_group}"]
        if E // self.n_group * self.topk_group < K:
            return [f"{self.topk_group} groups hold fewer than num_experts_per_tok {K} experts"]
        return []

    @property
    def is_sparse(self) -> bool:
        return bool(self.sparse_layers)

    @property
    def sparse_layers(self) -> list[int]:
        """Indices of the layers with experts (Qwen3-MoE's rule: every n-th, less `mlp_only_layers`)."""
        if not self.num_experts:
            return []
        return [
            layer
            for layer in range(self.num_hidden_layers)
            if (layer + 1) % self.decoder_sparse_step == 0 and layer not in self.mlp_only_layers
        ]

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def params(self) -> ParamCounts:
        """Parameters by kind; a tied embedding is counted once, as the embedding."""
        D, V, L = self.hidden_size, self.vocab_size, self.num_hidden_layers
        sparse = len(self.sparse_layers)
        q_dim = self.num_attention_heads * self.head_dim
        kv_dim = self.num_key_value_heads * self.head_dim
        qk_norm = {"none": 0, "head": 2 * self.head_dim, "full": q_dim + kv_dim}[self.qk_norm]
        attention = D * (2 * q_dim + 2 * kv_dim) + (q_dim + 2 * kv_dim) * self.attention_bias
        router = self.num_experts * (D + (self.router == "sigmoid"))
        return ParamCounts(
            embedding=V * D,
            lm_head=0 if self.tie_word_embeddings else V * D,
            attention=L * attention,
            norms=L * (2 * D + qk_norm) + D,
            dense_mlp=(L - sparse) * 3 * D * self.intermediate_size,
            shared_experts=sparse * self.n_shared_experts * self.expert_params,
            router=sparse * router,
            experts=sparse * self.num_experts * self.expert_params,
        )

    def num_params(self) -> int:
        """All parameters, the sigmoid router's selection biases included."""
        return self.params().total

    def num_active_params(self, input_embedding: bool = True) -> int:
        """Parameters that work on one token.

        Published figures use two conventions: with the whole input embedding, or without it.
        A tied embedding is also the output head, so it is then counted in both.
        """
        idle = self.num_experts - self.num_experts_per_tok
        active = self.num_params() - len(self.sparse_layers) * idle * self.expert_params
        if input_embedding or self.tie_word_embeddings:
            return active
        return active - self.params().embedding

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token that attends to `context` positions.

        Two per weight of every matrix that multiplies it, and four per attended position and
        head dimension (q·k and p·v). Norms, activations and the softmax are left out, as is usual.
        """
        counts = self.params()
        biases = self.num_hidden_layers * self.attention_bias * self.head_dim
        biases *= self.num_attention_heads + 2 * self.num_key_value_heads
        if self.router == "sigmoid":
            biases += len(self.sparse_layers) * self.num_experts
        matrices = self.num_active_params(input_embedding=False) - counts.norms - biases
        width = self.num_attention_heads * self.head_dim
        return 2 * matrices + 4 * context * width * self.num_hidden_layers

    def train_flops_per_token(self, seq_len: int) -> int:
        """Training FLOPs of one token: forward and twice that backward, at the mean causal context."""
        width = self.num_attention_heads * self.head_dim
        return 3 * (self.flops_per_token(0) + 2 * (seq_len + 1) * width * self.num_hidden_layers)

    def weight_bytes_per_token(self, dtype: str) -> int:
        """Bytes of weights one generated token reads: all that is active, and one embedding row."""
        row = 0 if self.tie_word_embeddings else self.hidden_size
        weights = self.num_active_params(input_embedding=False) + row
        return weights * BYTES_PER_WEIGHT[dtype]

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes the KV cache grows by for each token."""
        width = 2 * self.num_key_value_heads * self.head_dim
        return width * self.num_hidden_layers * BYTES_PER_WEIGHT[dtype]

    def dense_twin(self, equal: Literal["active", "total"]) -> "ModelConfig":
        """The dense model with the same active, or the same total, parameters (within 2%).

        Everything but the feed-forward layers stays as it is.
        Raises TenfoldError if no width comes within 2%.
        """
        wanted = self.num_active_params() if equal == "active" else self.num_params()
        counts = self.params()
        fixed = counts.embedding + counts.lm_head + counts.attention + counts.norms
        per_width = 3 * self.hidden_size * self.num_hidden_layers
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
    "mlp_only_layers", "decoder_sparse_step", "router", "norm_topk_prob", "n_group",
    "topk_group", "routed_scaling_factor", "capacity_factor",
}  # fmt: skip


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic found wrong, on one line: field, fault, and the value given."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}, not {problem['input']!r}" if field else message
