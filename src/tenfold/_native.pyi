"""The compiled module (csrc/module.cpp). Addresses are of C-contiguous CPU memory that must stay alive."""

from collections.abc import Sequence

def set_threads(threads: int) -> None: ...
def threads() -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def busy_seconds() -> float: ...
def quantize(format: int, weights: int, rows: int, columns: int, importance: int, panels: int, /) -> None: ...
def read_seconds(threads: int, address: int, bytes: int, /) -> float: ...
def peak(kind: str, isa: str, threads: int) -> float: ...
def rms_norm(x: int, weight: int, tokens: int, hidden: int, eps: float, y: int, /) -> None: ...

class Linear:
    def __init__(self, panels: int, format: int, rows: int, columns: int, bias: int = 0) -> None: ...
    def __call__(self, x: int, tokens: int, y: int, /) -> None: ...
    def rows(self, ids: int, count: int, out: int, /) -> None: ...

def end_where_a_file_is_lost() -> None: ...
def crc32(data: int, size: int, /) -> int: ...
def read_file(path: bytes, offset: int, size: int, to: int, /) -> None: ...

class Store:
    def __init__(
        self, files: list[bytes], layers: list[tuple[int, int, int, int, list[int]]], slots: int
    ) -> None: ...
    def warm(self, layer: int, experts: list[int]) -> None: ...
    def meter(self) -> tuple[int, int, int, float, int, int, int]: ...

class Experts:
    def __init__(
        self,
        records: int,
        record_bytes: int,
        format: int,
        experts: int,
        width: int,
        hidden: int,
        gate_up_bias: int = 0,
        down_bias: int = 0,
        clamped: bool = False,
    ) -> None: ...
    @staticmethod
    def streamed(
        store: Store,
        layer: int,
        format: int,
        experts: int,
        width: int,
        hidden: int,
        gate_up_bias: int = 0,
        down_bias: int = 0,
        clamped: bool = False,
    ) -> Experts: ...
    def __call__(self, x: int, tokens: int, ids: int, weights: int, top_k: int, out: int, /) -> None: ...

class Router:
    def __init__(
        self,
        weight: int,
        in_bf16: bool,
        experts: int,
        hidden: int,
        top_k: int,
        choice: int,
        logit_bias: int,
        selection_bias: int,
        renormalise: bool,
        groups: int,
        top_groups: int,
        scale: float,
    ) -> None: ...
    def __call__(self, x: int, tokens: int, ids: int, weights: int, /) -> None: ...

class Attention:
    def __init__(
        self,
        q: Linear,
        k: Linear,
        v: Linear,
        o: Linear,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        sinks: int,
        q_norm: int,
        k_norm: int,
        norm_per_head: bool,
        eps: float,
    ) -> None: ...

class LatentAttention:
    def __init__(
        self,
        q_a: Linear | None,
        q_a_norm: int,
        q: Linear,
        kv_a: Linear,
        kv_a_norm: int,
        key_up: int,
        value_up: int,
        o: Linear,
        heads: int,
        rank: int,
        plain: int,
        rotary: int,
        value: int,
        scale: float,
        window: int,
        eps: float,
    ) -> None: ...

class FeedForward:
    def __init__(
        self,
        gate_up: Linear | None,
        down: Linear | None,
        gate: int,
        router: Router | None,
        experts: Experts | None,
    ) -> None: ...

class Layer:
    def __init__(
        self,
        attention: Attention | None,
        latent: LatentAttention | None,
        feed_forward: FeedForward,
        input_norm: int,
        post_norm: int,
        eps: float,
        residual: float,
        hidden: int,
        cos: int,
        sin: int,
        rotary_dim: int,
        interleave: bool,
    ) -> None: ...

class Chunks:
    """IndexError for blocks that are none of the cache's."""

    def __init__(
        self, chunks: Sequence[tuple[Sequence[int], int, Sequence[int], int]], num_blocks: int
    ) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def wanted(self) -> int: ...
    @property
    def ids(self) -> int: ...

class Decoder:
    def __init__(
        self,
        layers: list[Layer],
        keys: list[int],
        values: list[int],
        block_size: int,
        head: Linear,
        norm: int,
        eps: float,
    ) -> None: ...
    def __call__(
        self,
        x: int,
        chunks: Chunks,
        first: int,
        end: int,
        chosen: int,
        top_k: int,
        chosen_last: int,
        logits: int,
        all_rows: bool,
    ) -> None: ...
