"""What a Switch Transformer is, and the arithmetic on it. Nothing here needs torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tenfold.config import ModelConfig
from tenfold.counting import BYTES_PER_WEIGHT, Counted, ParamCounts
from tenfold.errors import TenfoldError
from tenfold.parsed import MAX_EXPERTS, MAX_LAYERS, Parsed


class SwitchConfig(Counted, Parsed):
    """A T5 encoder-decoder (arXiv:1910.10683) with top-1 experts (arXiv:2101.03961).

    Fields as in Hugging Face's SwitchTransformersConfig.
    """

    model_type: Literal["switch_transformers"] = "switch_transformers"
    vocab_size: int = Field(gt=0)
    d_model: int = Field(gt=0)
    d_kv: int = Field(gt=0, description="width of an attention head")
    d_ff: int = Field(gt=0, description="width of a dense layer, and of an expert")
    num_layers: int = Field(gt=0, le=MAX_LAYERS, description="of the encoder")
    num_decoder_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_heads: int = Field(gt=0)
    num_experts: int = Field(gt=0, description="in a sparse layer")
    expert_capacity: int = Field(gt=0, description="tokens of one sequence that an expert takes")
    encoder_sparse_step: int = Field(
        ge=0, description="every n-th layer is sparse, from the second on; 1 is all, 0 none"
    )
    decoder_sparse_step: int = Field(ge=0)
    router_bias: bool = False
    relative_attention_num_buckets: int = Field(32, ge=4)
    relative_attention_max_distance: int = Field(128, gt=0, description="farther is all one bucket")
    layer_norm_epsilon: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = Field(
        True, description="encoder, decoder and head share one embedding, else each has its own"
    )
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int = Field(0, ge=0, description="what the decoder reads first")

    @model_validator(mode="after")
    def _check(self) -> Self:
        exact = self.relative_attention_num_buckets // 2
        if self.relative_attention_max_distance <= exact:
            raise ValueError(
                f"relative_attention_max_distance {self.relative_attention_max_distance} must be more than"
                f" half of relative_attention_num_buckets {self.relative_attention_num_buckets}"
            )
        if self.decoder_start_token_id >= self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id {self.decoder_start_token_id} must be less than"
                f" vocab_size {self.vocab_size}"
            )
        if self.num_sparse_layers * self.num_experts > MAX_EXPERTS:
            layers = f"in {self.num_sparse_layers} layers"
            raise ValueError(f"num_experts {self.num_experts} {layers} is more than any model has")
        return self

    @property
    def encoder_sparse_layers(self) -> list[int]:
        return _every_nth(self.num_layers, self.encoder_sparse_step)

    @property
    def decoder_sparse_layers(self) -> list[int]:
        return _every_nth(self.num_decoder_layers, self.decoder_sparse_step)

    @property
    def num_experts_per_tok(self) -> int:
        return 1

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def inner_dim(self) -> int:
        """Dimensions of all heads."""
        return self.num_heads * self.d_kv

    @property
    def mlp_params(self) -> int:
        """Weights of one dense feed-forward, or of one expert."""
        return 2 * self.d_model * self.d_ff

    @property
    def num_sparse_layers(self) -> int:
        return len(self.encoder_sparse_layers) + len(self.decoder_sparse_layers)

    def params(self) -> ParamCounts:
        D, V, encoder, decoder = self.d_model, self.vocab_size, self.num_layers, self.num_decoder_layers
        E, sparse = self.num_experts, self.num_sparse_layers
        tied = self.tie_word_embeddings
        return ParamCounts(
            embedding=V * D if tied else 2 * V * D,
            lm_head=0 if tied else V * D,
            attention=(encoder + 2 * decoder) * 4 * D * self.inner_dim + 2 * self._bias_table(),
            norms=(2 * encoder + 3 * decoder + 2) * D,
            dense_mlp=(encoder + decoder - sparse) * self.mlp_params,
            shared_experts=0,
            router=sparse * E * (D + self.router_bias),
            experts=sparse * E * self.mlp_params,
            biases=0,
        )

    def idle_params(self) -> int:
        return self.num_sparse_layers * (self.num_experts - 1) * self.mlp_params

    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one generated token; prompt and generated text together fill `context`.

        Of the decoder and the head, counted as `ModelConfig.flops_per_token` does. The encoder and
        the keys and values of cross-attention are the prompt's cost, paid once.
        """
        attended = 2 * self.inner_dim * self.num_decoder_layers * context
        return 2 * (self._decode_matrices() + attended)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of cache for each token: cross-attention's for the prompt's, else self-attention's."""
        return 2 * self.inner_dim * self.num_decoder_layers * BYTES_PER_WEIGHT[dtype]

    def weights_per_token(self) -> int:
        """Weights one generated token reads: decoder, head, and one row of the embedding."""
        router_biases = len(self.decoder_sparse_layers) * self.num_experts * self.router_bias
        norms = (3 * self.num_decoder_layers + 1) * self.d_model
        row = 0 if self.tie_word_embeddings else self.d_model
        return self._decode_matrices() + router_biases + norms + self._bias_table() + row

    def _decode_matrices(self) -> int:
        """Weights that multiply one generated token."""
        layer = 6 * self.d_model * self.inner_dim + self.mlp_params
        routers = len(self.decoder_sparse_layers) * self.num_experts * self.d_model
        return self.num_decoder_layers * layer + routers + self.vocab_size * self.d_model

    def _bias_table(self) -> int:
        return self.relative_attention_num_buckets * self.num_heads


AnyConfig = ModelConfig | SwitchConfig


def decoder_only(config: AnyConfig, source: str) -> ModelConfig:
    """`config` for what works on decoder-only models; a TenfoldError names `source` if it is not one."""
    if not isinstance(config, ModelConfig):
        raise TenfoldError(f"{source} is an encoder-decoder ({config.model_type}); give a decoder-only model")
    return config


def _every_nth(num_layers: int, step: int) -> list[int]:
    """Transformers' rule, layers counted from 0: those that leave 1 when divided by `step`."""
    return [layer for layer in range(num_layers) if step == 1 or (step > 1 and layer % step == 1)]
