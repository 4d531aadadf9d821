"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): one more layer, one token further."""

import torch
from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.model.attention import Place
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.model.layers import RMSNorm
from tenfold.model.router import RouterAux


class MultiTokenPrediction(nn.Module):
    """From a token's final state and the next token's embedding, the state that predicts the one after.

    Embedding and head are the main model's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        self.enorm = RMSNorm(D, config.rms_norm_eps)
        self.hnorm = RMSNorm(D, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.layer = DecoderLayer(config, config.is_sparse)
        self.norm = RMSNorm(D, config.rms_norm_eps)

    def forward(
        self, hidden_BSD: Tensor, next_embedding_BSD: Tensor, place: Place
    ) -> tuple[Tensor, RouterAux | None]:
        out_BSD, aux = self.layer(self.combine(hidden_BSD, next_embedding_BSD), place, None)
        return self.norm(out_BSD), aux

    def combine(self, hidden_BSD: Tensor, next_embedding_BSD: Tensor) -> Tensor:
        """What the layer takes."""
        both = torch.cat((self.enorm(next_embedding_BSD), self.hnorm(hidden_BSD)), dim=-1)
        combined_BSD: Tensor = self.eh_proj(both)
        return combined_BSD
