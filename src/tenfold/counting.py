"""The arithmetic that every model config shares: parameters, active parameters, bytes. All exact."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from math import ceil

BITS_PER_WEIGHT = {
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8": 8,  # DeepSeek-V3's float32 scale of each 128×128 block adds 0.002
    "q8": 8.25,  # 32 weights share a scale byte (see quantization); a row's float32 adds 32 / columns
    "q4": 4.25,  # the same
    "mxfp4": 4.25,  # OCP Microscaling v1.0: 32 weights of 4 bits share an 8-bit exponent
}
"""With every weight in that format. Real files keep some wider: norms, routers, often embeddings."""

BYTES_PER_WEIGHT = {form: int(bits) // 8 for form, bits in BITS_PER_WEIGHT.items() if bits % 8 == 0}
"""Formats without scales, which a KV cache may have too."""


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
    biases: int
    """Of attention, with its sinks, and of feed-forward layers; a router's are counted with it."""

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


class Counted(ABC):
    """Counts that follow from `params` and the few facts below, for any architecture."""

    tie_word_embeddings: bool

    @abstractmethod
    def params(self) -> ParamCounts:
        """Parameters by kind; a tied embedding is counted once, as the embedding."""

    @abstractmethod
    def idle_params(self) -> int:
        """Parameters of the experts that one token does not choose."""

    def num_params(self) -> int:
        """All parameters, the selection biases of sigmoid routers included, multi-token prediction not."""
        return self.params().total

    def mtp_params(self) -> int:
        """Parameters of multi-token-prediction modules, where there are any."""
        return 0

    def num_active_params(self, input_embedding: bool = True) -> int:
        """Parameters that work on one token.

        Published figures use two conventions: with the whole input embedding, or without it.
        A tied embedding is also the output head, so it is then counted in both.
        """
        active = self.num_params() - self.idle_params()
        if input_embedding or self.tie_word_embeddings:
            return active
        return active - self.params().embedding

    @abstractmethod
    def weights_per_token(self) -> int:
        """Weights one generated token reads."""

    def weight_bytes(self, form: str) -> int:
        """Bytes of all weights in one of the formats of `BITS_PER_WEIGHT`."""
        return ceil(self.num_params() * BITS_PER_WEIGHT[form] / 8)

    def weight_bytes_per_token(self, form: str) -> int:
        """Bytes of weights one generated token reads."""
        return ceil(self.weights_per_token() * BITS_PER_WEIGHT[form] / 8)
