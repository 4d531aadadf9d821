"""How many bytes of weights one step of decoding has to read: counted from the weights in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from tenfold.config import ModelConfig
from tenfold.packed import PackedExperts, PackedMatrix, StreamedExperts, Weight


@dataclass(frozen=True)
class Reading:
    """What a batch of one token a sequence reads, each weight once."""

    bytes_per_step: int
    always_bytes: int
    """Of those, what is no routed expert's record."""
    experts_per_layer: float
    """Different ones in a sparse layer: what to expect where all experts are equally likely."""

    @classmethod
    def of(cls, config: ModelConfig, weights: Mapping[str, Weight], batch: int) -> Self:
        """Experts by expectation; of an embedding that is not the head too, one row a sequence."""
        touched = expected_experts(config.num_experts, config.num_experts_per_tok, batch)
        always, experts = 0.0, 0.0
        for name, weight in weights.items():
            if name.startswith("mtp."):
                continue
            share = 1.0
            if ".mlp.experts" in name:
                share = touched / config.num_experts
            elif name == "embed_tokens.weight" and not config.tie_word_embeddings:
                share = min(1.0, batch / config.vocab_size)
            if isinstance(weight, (PackedExperts, StreamedExperts)):
                experts += share * num_bytes(name, weight)
            else:
                always += share * num_bytes(name, weight)
        return cls(round(always + experts), round(always), touched)


def expected_experts(experts: int, per_token: int, tokens: int) -> float:
    """Different experts that `tokens` tokens choose, each `per_token` of `experts`, all equally likely."""
    if not experts:
        return 0.0
    return float(experts * (1 - (1 - per_token / experts) ** tokens))


def num_bytes(name: str, weight: Weight) -> int:
    if isinstance(weight, PackedMatrix):
        folded = name.endswith("kv_b_proj.weight")  # engine.latent
        return 2 * weight.rows * weight.columns if folded else weight.panels.nbytes
    return weight.records.nbytes if isinstance(weight, PackedExperts) else weight.nbytes
