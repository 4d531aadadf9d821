"""The decoder-only transformer, dense or sparse. Submodules are named as in Hugging Face."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.attention import Attention, LayerCache
from tenfold.model.layers import RMSNorm, SwiGLU, rope_tables
from tenfold.model.moe import SparseMoE
from tenfold.model.router import RouterAux


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = index in config.sparse_layers
        self.mlp = SparseMoE(config) if sparse else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None
    ) -> tuple[Tensor, RouterAux | None]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, cache)
        h_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, SparseMoE):
            out_BSD, aux = self.mlp(h_BSD)
            return x_BSD + out_BSD, aux
        return x_BSD + self.mlp(h_BSD), None


class Transformer(nn.Module):
    """`model(input_ids) -> logits`; sparse layers also hand back what their routers did, on request."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self, seed: int) -> "Transformer":
        """Normal(0, initializer_range) matrices, drawn in order of depth from one seed on the CPU.

        Matrices that write to the residual stream are scaled by 1/sqrt(2 x layers) (GPT-2).
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.initializer_range
        residual = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                scale = residual if name.endswith(("o_proj.weight", "down.weight", ".down")) else std
                drawn = torch.randn(parameter.shape, generator=generator) * scale
                parameter.data.copy_(drawn)
        return self

    @overload
    def forward(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = ...,
        start: int = ...,
        return_aux: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = ...,
        start: int = ...,
        *,
        return_aux: Literal[True],
    ) -> tuple[Tensor, list[RouterAux]]: ...
    def forward(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = None,
        start: int = 0,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, list[RouterAux]]:
        """Logits (B, S, V) for tokens at positions start, start + 1, …

        `cache` holds one entry a layer and is extended in place. With `return_aux`, the router
        outputs of the sparse layers come too, in order of depth.
        """
        hidden_BSD, aux = self.hidden_states(input_ids_BS, cache, start)
        logits_BSV: Tensor = self.lm_head(hidden_BSD)
        return (logits_BSV, aux) if return_aux else logits_BSV

    def hidden_states(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, list[RouterAux]]:
        """What `lm_head` turns into logits (B, S, D), and what the routers did, in order of depth."""
        if cache is not None and self.config.router == "expert_choice" and self.config.is_sparse:
            raise TenfoldError(
                "router expert_choice cannot generate: its experts choose among tokens of the future;"
                " train with another router to generate"
            )
        positions = torch.arange(start, start + input_ids_BS.shape[1], device=input_ids_BS.device)
        rope = rope_tables(self.config, positions)
        x_BSD = self.embed_tokens(input_ids_BS)
        aux = []
        for index, layer in enumerate(self.layers):
            x_BSD, layer_aux = layer(x_BSD, rope, None if cache is None else cache[index])
            if layer_aux is not None:
                aux.append(layer_aux)
        return self.norm(x_BSD), aux
