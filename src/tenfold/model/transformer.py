"""The decoder-only transformer, dense or sparse. Submodules are named as in Hugging Face."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.model.attend import visible
from tenfold.model.attention import LayerCache, Place
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.model.layers import RMSNorm
from tenfold.model.mtp import MultiTokenPrediction
from tenfold.model.rope import rope_tables
from tenfold.model.router import RouterAux


class Transformer(nn.Module):
    """`model(input_ids) -> logits`; sparse layers also hand back what their routers did, on request."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        embedding_VD = torch.empty(config.vocab_size, config.hidden_size)
        if not embedding_VD.is_meta:  # there, drawing nothing at random would import 80 MB of compiler
            embedding_VD.normal_()
        self.embed_tokens = nn.Embedding.from_pretrained(embedding_VD, freeze=False)
        sparse = set(config.sparse_layers)
        self.layers = nn.ModuleList(
            DecoderLayer(config, n in sparse) for n in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.mtp = nn.ModuleList(MultiTokenPrediction(config) for _ in range(config.num_nextn_predict_layers))

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
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
        attention_mask: Tensor | None = ...,
        return_aux: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = ...,
        start: int = ...,
        attention_mask: Tensor | None = ...,
        *,
        return_aux: Literal[True],
    ) -> tuple[Tensor, list[RouterAux]]: ...
    def forward(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = None,
        start: int = 0,
        attention_mask: Tensor | None = None,
        return_aux: bool = False,
    ) -> Tensor | tuple[Tensor, list[RouterAux]]:
        """Logits (B, S, V) for tokens at positions start, start + 1, …

        `cache` holds one entry a layer and is extended in place. `attention_mask` (B, start + S) is 0
        at padding, which must come first in its row (left-padding). With `return_aux`, the router
        outputs of the sparse layers come too, in order of depth.
        """
        hidden_BSD, aux = self.hidden_states(input_ids_BS, cache, start, attention_mask)
        logits_BSV = self.logits(hidden_BSD)
        return (logits_BSV, aux) if return_aux else logits_BSV

    def logits(self, hidden: Tensor) -> Tensor:
        """Of what `hidden_states` returned, (..., D) -> (..., V)."""
        logits: Tensor = self.lm_head(hidden)
        return logits if self.config.logits_scaling == 1 else logits / self.config.logits_scaling

    def hidden_states(
        self,
        input_ids_BS: Tensor,
        cache: Sequence[LayerCache] | None = None,
        start: int = 0,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterAux]]:
        """What `logits` takes (B, S, D), and what the routers did, in order of depth."""
        if cache is not None:
            self.config.check_generates()
        places = self._places(start, input_ids_BS.shape[1], attention_mask, input_ids_BS.device)
        x_BSD = self.embed(input_ids_BS)
        aux = []
        for index, layer in enumerate(self.layers):
            place = places[self.config.window(index)]
            x_BSD, layer_aux = layer(x_BSD, place, None if cache is None else cache[index])
            if layer_aux is not None:
                aux.append(layer_aux)
        return self.norm(x_BSD), aux

    def states_ahead(self, hidden_BSD: Tensor, input_ids_BS: Tensor) -> tuple[Tensor, list[RouterAux]]:
        """What predicts the token after next, (B, S - 1, D), from `hidden_states` of the same tokens.

        Needs a model with `num_nextn_predict_layers`.
        """
        (module,) = self.mtp
        place = self._places(0, input_ids_BS.shape[1] - 1, None, input_ids_BS.device)
        window = self.config.window(self.config.num_hidden_layers - 1)
        ahead_BSD, aux = module(hidden_BSD[:, :-1], self.embed(input_ids_BS[:, 1:]), place[window])
        return ahead_BSD, [] if aux is None else [aux]

    def embed(self, input_ids_BS: Tensor) -> Tensor:
        """What the first layer takes, (B, S, D)."""
        x_BSD: Tensor = self.embed_tokens(input_ids_BS)
        multiplier = self.config.embedding_multiplier
        return x_BSD if multiplier == 1 else x_BSD * multiplier

    def _places(
        self, start: int, new: int, attention_mask: Tensor | None, device: torch.device
    ) -> dict[int | None, Place]:
        """For each window that layers have, where the new tokens stand and what they see."""
        real_BT = None if attention_mask is None else attention_mask.bool()
        if real_BT is None:
            positions = torch.arange(start, start + new, device=device)
        else:
            positions = (real_BT.cumsum(-1) - 1).clamp(min=0)[:, start:]
        cos, sin = rope_tables(self.config, positions)
        windows = {self.config.window(n) for n in range(self.config.num_hidden_layers)}
        if new == 1 and real_BT is None:  # decoding: keys out of reach are not even read
            return {window: Place(cos, sin, None, window) for window in windows}
        masks = {window: visible(new, start + new, window, real_BT, device) for window in windows}
        return {window: Place(cos, sin, mask, None) for window, mask in masks.items()}
