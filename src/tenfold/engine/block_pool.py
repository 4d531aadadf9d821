"""Keys and values in blocks that sequences of any length share out, and what tokens of a pass see of them.

Only positions that were written are ever read: what else is in a block does not matter.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.engine.batch import Chunk
from tenfold.engine.kv_cache import cache_shape
from tenfold.model.attention import BaseAttention
from tenfold.model.decoder_layer import DecoderLayer
from tenfold.model.rope import rope_tables

SHORT = 16
"""Tokens, at most, of chunks that attend together with others of the same size."""


class View(NamedTuple):
    """What B sequences see in layers of one window."""

    slots_BT: Tensor
    """Of their last positions, their new ones included: where in the pool they are."""
    mask: Tensor | None
    """As `attend` takes it."""


class Group(NamedTuple):
    """B sequences that bring S tokens each and attend at once."""

    rows_BS: Tensor
    """Their tokens in the pass."""
    views: dict[int | None, View]
    """By window."""


class Places(NamedTuple):
    """Where the T tokens of a pass stand: the same for every layer."""

    cos: Tensor
    sin: Tensor
    slots_T: Tensor
    """Where in the pool their keys and values go."""
    groups: Sequence[Group]
    order_T: Tensor
    """Where each token is among those of the groups, one group after the other."""


class BlockPool:
    """One layer's keys and values, (H_kv, blocks * block_size, width)."""

    def __init__(self, config: ModelConfig, positions: int, dtype: torch.dtype, device: torch.device):
        heads, *widths = cache_shape(config)
        self._key, self._value = (
            torch.empty(heads, positions, width, dtype=dtype, device=device) for width in widths
        )

    def attend(self, layer: DecoderLayer, x_1TD: Tensor, places: Places, window: int | None) -> Tensor:
        """The attention half of `layer`, over this pool: new tokens are written to it first."""
        return self.read(layer, x_1TD, self.write(layer, x_1TD, places), places, window)

    def read(
        self, layer: DecoderLayer, x_1TD: Tensor, query: Tensor, places: Places, window: int | None
    ) -> Tensor:
        """The rest of `attend`, for tokens that were written: `query` (1, H, T, width) is theirs."""
        attention = layer.self_attn
        parts = [self._part(attention, query[0], group, group.views[window]) for group in places.groups]
        out = torch.cat(parts)[places.order_T].transpose(0, 1)
        return layer.add(x_1TD, attention.output(out[None]))

    def write(self, layer: DecoderLayer, x_1TD: Tensor, places: Places) -> Tensor:
        """The beginning of `attend`: keys and values of new tokens. Returns their `query`."""
        query, key, value = layer.self_attn.project(layer.input_layernorm(x_1TD), places.cos, places.sin)
        self._key.index_copy_(1, places.slots_T, key[0])
        self._value.index_copy_(1, places.slots_T, value[0])
        return query

    def _part(self, attention: BaseAttention, query_HTw: Tensor, group: Group, view: View) -> Tensor:
        """(B * S, H, value width)"""
        query = query_HTw[:, group.rows_BS].transpose(0, 1)
        key, value = (
            pool.index_select(1, view.slots_BT.flatten()).unflatten(1, view.slots_BT.shape).transpose(0, 1)
            for pool in (self._key, self._value)
        )
        return attention.attend(query, key, value, view.mask).transpose(1, 2).flatten(0, 1)


def places_of(
    chunks: Sequence[Chunk],
    config: ModelConfig,
    block_size: int,
    windows: Iterable[int | None],
    device: torch.device,
) -> Places:
    """For layers of any of these windows."""
    rows = torch.arange(sum(len(chunk.ids) for chunk in chunks)).split([len(chunk.ids) for chunk in chunks])
    together = defaultdict(list)
    for n, chunk in enumerate(chunks):
        size, end = len(chunk.ids), chunk.start + len(chunk.ids)
        # Sequences are padded to the longest of their group, so their lengths differ by half at most.
        together[(size, end.bit_length(), n if size > SHORT else None)].append(n)
    groups = [
        Group(
            torch.stack([rows[n] for n in members]).to(device),
            _views([chunks[n] for n in members], block_size, windows, device),
        )
        for members in together.values()
    ]
    positions = [torch.arange(chunk.start, chunk.start + len(chunk.ids)) for chunk in chunks]
    slots = [
        _slots(torch.tensor([chunk.blocks]), positions_S[None], block_size)[0]
        for chunk, positions_S in zip(chunks, positions, strict=True)
    ]
    cos, sin = rope_tables(config, torch.cat(positions).to(device))
    order_T = torch.cat([group.rows_BS.flatten() for group in groups]).argsort()
    return Places(cos, sin, torch.cat(slots).to(device), groups, order_T)


def _views(
    chunks: Sequence[Chunk], block_size: int, windows: Iterable[int | None], device: torch.device
) -> dict[int | None, View]:
    """Of chunks of one size."""
    size, most = len(chunks[0].ids), max(len(chunk.blocks) for chunk in chunks)
    tables = torch.tensor([[*chunk.blocks, *[0] * (most - len(chunk.blocks))] for chunk in chunks])
    starts_B1 = torch.tensor([[chunk.start] for chunk in chunks])
    ends_B1 = starts_B1 + size
    queries_BS1 = (starts_B1 + torch.arange(size))[..., None]
    views = {}
    for window in windows:
        reach = int(ends_B1.max()) if window is None else min(int(ends_B1.max()), window + size - 1)
        keys_BT = ends_B1 - torch.arange(reach, 0, -1)  # negative where a shorter sequence is padded
        mask = None
        if int(ends_B1.min()) < reach or (window is not None and window < reach):
            keys_B1T = keys_BT[:, None]
            seen_BST = (keys_B1T >= 0) & (keys_B1T <= queries_BS1)
            if window is not None:
                seen_BST &= keys_B1T > queries_BS1 - window
            mask = seen_BST[:, None].to(device)
        views[window] = View(_slots(tables, keys_BT.clamp(min=0), block_size).to(device), mask)
    return views


def _slots(tables: Tensor, positions_BS: Tensor, block_size: int) -> Tensor:
    """Positions in the pool of positions in sequences, whose blocks are `tables` (B, blocks)."""
    return tables.gather(1, positions_BS // block_size) * block_size + positions_BS % block_size
