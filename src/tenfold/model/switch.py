"""The Switch Transformer: T5's encoder-decoder (arXiv:1910.10683) with experts (arXiv:2101.03961)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from tenfold.model.attention import LayerCache
from tenfold.model.layers import RMSNorm
from tenfold.model.router import RouterAux
from tenfold.model.switch_moe import ReluMLP, SwitchMoE
from tenfold.model.t5_attention import RelativePositionBias, T5Attention, hide
from tenfold.switch_config import SwitchConfig


class LayerMemory(NamedTuple):
    """What one decoder layer sees of the prompt."""

    key: Tensor
    value: Tensor
    """(B, H, T, d_kv) each."""
    bias: Tensor
    """(B, 1, 1, T), which hides padding."""


class Block(nn.Module):
    """Attention, in the decoder attention over the prompt, then a dense or sparse feed-forward."""

    def __init__(self, config: SwitchConfig, sparse: bool, decoder: bool):
        super().__init__()
        self.self_attn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attn = T5Attention(config)
        if decoder:
            self.cross_attn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attn = T5Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mlp = SwitchMoE(config) if sparse else ReluMLP(config)

    def remember(self, prompt_BTD: Tensor, bias: Tensor) -> LayerMemory:
        """What this layer, one of the decoder, will see of what the encoder made of the prompt."""
        return LayerMemory(*self.cross_attn.keys_values(prompt_BTD), bias)

    def forward(
        self,
        x_BSD: Tensor,
        bias: Tensor,
        real_BS: Tensor | None = None,
        memory: LayerMemory | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, RouterAux | None]:
        h_BSD = self.self_attn_norm(x_BSD)
        key, value = self.self_attn.keys_values(h_BSD)
        if cache is not None:
            key, value = cache.update(key, value)
        x_BSD = x_BSD + self.self_attn(h_BSD, key, value, bias)
        if memory is not None:
            x_BSD = x_BSD + self.cross_attn(self.cross_attn_norm(x_BSD), *memory)
        h_BSD = self.mlp_norm(x_BSD)
        if isinstance(self.mlp, SwitchMoE):
            out_BSD, aux = self.mlp(h_BSD, real_BS)
            return x_BSD + out_BSD, aux
        return x_BSD + self.mlp(h_BSD), None


class Stack(nn.Module):
    """Encoder or decoder."""

    def __init__(self, config: SwitchConfig, num_layers: int, sparse: list[int], decoder: bool):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.relative_attention_bias = RelativePositionBias(config, bidirectional=not decoder)
        self.block = nn.ModuleList(Block(config, n in sparse, decoder) for n in range(num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class SwitchTransformer(nn.Module):
    """`model(input_ids, decoder_input_ids) -> logits`, as SwitchTransformersForConditionalGeneration.

    Dropout is left out, in training too. With tied embeddings the final states are scaled by
    d_model ** -0.5 before they meet the embedding, as in T5.
    """

    def __init__(self, config: SwitchConfig):
        super().__init__()
        self.config = config
        self.encoder = Stack(config, config.num_layers, config.encoder_sparse_layers, decoder=False)
        self.decoder = Stack(config, config.num_decoder_layers, config.decoder_sparse_layers, decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens.weight = self.encoder.embed_tokens.weight
            self.lm_head.weight = self.encoder.embed_tokens.weight

    def forward(
        self, input_ids_BT: Tensor, decoder_input_ids_BS: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, S, V). `attention_mask` (B, T) is 0 at padding of the prompt, on either side."""
        memory, _ = self.encode(input_ids_BT, attention_mask)
        hidden_BSD, _ = self.decode(decoder_input_ids_BS, memory)
        return self.logits(hidden_BSD)

    def encode(
        self, input_ids_BT: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[LayerMemory], list[RouterAux]]:
        """What each decoder layer needs of the prompt, and what the encoder's routers did."""
        stack, aux = self.encoder, []
        x_BTD = stack.embed_tokens(input_ids_BT)
        real_BT = torch.ones_like(input_ids_BT) if attention_mask is None else attention_mask
        real_BT = real_BT.bool()
        padding = hide(x_BTD.new_zeros(len(x_BTD), 1, 1, x_BTD.shape[1]), ~real_BT[:, None, None])
        bias = stack.relative_attention_bias(x_BTD.shape[1], x_BTD.shape[1]) + padding
        for block in stack.block:
            x_BTD, layer_aux = block(x_BTD, bias, real_BT)
            aux.append(layer_aux)
        x_BTD = stack.final_layer_norm(x_BTD)
        decoder = cast(Iterable[Block], self.decoder.block)
        memory = [block.remember(x_BTD, padding) for block in decoder]
        return memory, [a for a in aux if a is not None]

    def decode(
        self,
        decoder_input_ids_BS: Tensor,
        memory: Sequence[LayerMemory],
        cache: Sequence[LayerCache] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, list[RouterAux]]:
        """What `logits` takes (B, S, D) for tokens at positions start, start + 1, …, and router outputs.

        `cache` holds one entry a decoder layer and is extended in place.
        """
        stack, aux = self.decoder, []
        x_BSD = stack.embed_tokens(decoder_input_ids_BS)
        bias = stack.relative_attention_bias(x_BSD.shape[1], start + x_BSD.shape[1])
        for index, block in enumerate(stack.block):
            layer_cache = None if cache is None else cache[index]
            x_BSD, layer_aux = block(x_BSD, bias, None, memory[index], layer_cache)
            aux.append(layer_aux)
        return stack.final_layer_norm(x_BSD), [a for a in aux if a is not None]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of what `decode` returned, (..., D) -> (..., V)."""
        if self.config.tie_word_embeddings:
            hidden = hidden * self.config.d_model**-0.5
        logits: Tensor = self.lm_head(hidden)
        return logits
