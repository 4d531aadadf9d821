"""The arithmetic that every model config shares: parameters, active parameters, bytes. All exact."""

from dataclasses import dataclass, fields

BYTES_PER_WEIGHT = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}


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


class Counted:
    """Counts that follow from `params` and the few facts below, for any architecture."""

    tie_word_embeddings: bool

    def params(self) -> ParamCounts:
        """Parameters by kind; a tied embedding is counted once, as the embedding."""
        raise NotImplementedError

    def idle_params(self) -> int:
        """Parameters of the experts that one token does not choose."""
        raise NotImplementedError

    def num_params(self) -> int:
        """All parameters, the selection biases of sigmoid routers included, multi-token prediction not."""
        return self.params().total

    def num_active_params(self, input_embedding: bool = True) -> int:
        """Parameters that work on one token.

        Published figures use two conventions: with the whole input embedding, or without it.
        A tied embedding is also the output head, so it is then counted in both.
        """
        active = self.num_params() - self.idle_params()
        if input_embedding or self.tie_word_embeddings:
            return active
        return active - self.params().embedding
