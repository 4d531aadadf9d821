"""The ordinary torch model behind the interface that the native engine has."""

import torch
from torch import Tensor

from tenfold.engine.kv_cache import new_kv_cache
from tenfold.model.transformer import Transformer


class TorchRunner:
    def __init__(self, model: Transformer, batch: int, capacity: int):
        self.model, self.batch, self.capacity = model, batch, capacity
        self.reset()

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Append the tokens; logits (B, V) after the last."""
        hidden_BSD, _ = self.model.hidden_states(ids_BS, self.cache, self.position)
        self.position += ids_BS.shape[1]
        return self.model.logits(hidden_BSD[:, -1])

    def reset(self) -> None:
        """Forget every token."""
        weight = self.model.embed_tokens.weight
        self.cache = new_kv_cache(
            self.model.config, self.batch, self.capacity, weight.dtype, torch.device("cpu")
        )
        self.position = 0
