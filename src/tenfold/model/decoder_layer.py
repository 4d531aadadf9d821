"""One block of the transformer: attention, then a dense or sparse feed-forward."""

from torch import Tensor, nn

from tenfold.config import ModelConfig
from tenfold.model.attention import Attention, LayerCache, Place
from tenfold.model.layers import RMSNorm, SwiGLU
from tenfold.model.mla import LatentAttention
from tenfold.model.moe import SparseMoE
from tenfold.model.router import RouterAux


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, sparse: bool):
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config) if config.is_latent else Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        dense = (config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.mlp = SparseMoE(config) if sparse else SwiGLU(*dense)

    def forward(
        self, x_BSD: Tensor, place: Place, cache: LayerCache | None
    ) -> tuple[Tensor, RouterAux | None]:
        x_BSD = self.add(x_BSD, self.self_attn(self.input_layernorm(x_BSD), place, cache))
        return self.feed_forward(x_BSD)

    def feed_forward(self, x_BSD: Tensor) -> tuple[Tensor, RouterAux | None]:
        """The second half of the layer, which looks at no other token."""
        h_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, SparseMoE):
            out_BSD, aux = self.mlp(h_BSD)
            return self.add(x_BSD, out_BSD), aux
        return self.add(x_BSD, self.mlp(h_BSD)), None

    def add(self, x_BSD: Tensor, out_BSD: Tensor) -> Tensor:
        """What one half of the layer adds to the residual stream."""
        if self.residual_multiplier == 1:
            return x_BSD + out_BSD
        return x_BSD + out_BSD * self.residual_multiplier
