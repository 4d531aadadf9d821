"""What a packed model takes while it runs, counted from its config before any weight is read; and how many of
its experts a memory budget therefore holds.

A budget is a contract about everything: Python and its libraries, weights, KV cache, scratch, and what the
system keeps for the process. Only the experts give way. What is counted is an upper bound of what
`engine.packed`, `engine.latent` and csrc/ allocate; each term names whose it is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tenfold import compiled
from tenfold.checkpoint.pack.layout import Experts, Matrix, Part
from tenfold.checkpoint.pack.record import whole_pages
from tenfold.config import ModelConfig
from tenfold.engine.batch import LOGITS_BYTES
from tenfold.engine.expert_store import LEAST_SLOTS
from tenfold.engine.kv_cache import cache_shape
from tenfold.engine.packed import PIECE
from tenfold.engine.packed_batch import BLOCK_SIZE, WIDTH
from tenfold.engine.speculation import DRAFTS
from tenfold.errors import TenfoldError
from tenfold.memory import Plan, available_bytes, peak_memory_bytes, resident_bytes, size
from tenfold.panels import matrix_bytes

SYSTEM_BYTES = 48 << 20
"""Libraries' code that is first touched while running, thread stacks, the kernel's own for a process."""
SYSTEM_SHARE = 1 / 256
"""Of everything: page tables, a 512th in pages of 4 KiB, and as much again for what malloc rounds."""
EXPERT_BYTES = 2048
"""For an expert's entry in the tables of what a file holds."""
HUGE_PAGE = 2 << 20
FREE_SHARE = 1 / 16
"""Of the free memory, left to others where no budget is named."""
NAMED_STEP = 4 << 20
"""The smallest budget is named in multiples of this: what a process takes differs a little each time."""


class Room(NamedTuple):
    """What a run needs memory for besides the model."""

    batch: int
    """Sequences at once."""
    context: int
    """Positions of each, at most."""
    shared: int | None = None
    """Positions of all together, where there is not room for every sequence to be that long."""
    pass_tokens: int | None = None
    """Tokens that go through the layers at once; None is what a run by itself takes."""

    @property
    def positions(self) -> int:
        return self.batch * _blocks(self.context) if self.shared is None else _blocks(self.shared)

    @property
    def tokens(self) -> int:
        if self.pass_tokens is not None:
            return self.pass_tokens
        return min(self.batch * self.context, self.batch * max(1, PIECE // self.batch))


def _blocks(positions: int) -> int:
    """Rounded up to whole blocks."""
    return -(-positions // BLOCK_SIZE) * BLOCK_SIZE


def plan_memory(
    config: ModelConfig, parts: Sequence[Part], limit: int | None, room: Room, reserve: int = 0
) -> Plan:
    """How `limit` bytes are spent, by default what is free less a margin. Call it when all is imported.

    `limit` and `reserve` are a `Budget`'s. Raises TenfoldError where not even two experts would fit, naming
    the smallest budget that works.
    """
    process = resident_bytes() + reserve
    budget = default_budget(process) if limit is None else limit
    weights = always_bytes(config, parts)
    kv_cache = kv_cache_bytes(config, room)
    layers = [part for part in parts if isinstance(part, Experts)]
    experts = sum(layer.count for layer in layers)
    record = max((layer.record_bytes for layer in layers), default=0)
    fixed = SYSTEM_BYTES + experts * EXPERT_BYTES + (HUGE_PAGE if experts else 0)
    scratch = scratch_bytes(config, room) + fixed + math.ceil(budget * SYSTEM_SHARE)
    needed = process + weights + kv_cache + scratch
    fewest = min(LEAST_SLOTS, experts)
    plan = Plan(
        budget=budget,
        process=process,
        weights=weights,
        kv_cache=kv_cache,
        scratch=scratch,
        record=record,
        slots=min(experts, (budget - needed) // record) if record else 0,
        experts=experts,
        batch=room.batch,
        context=room.context,
        shared=room.shared,
    )
    if plan.slots < fewest or needed > budget or peak_memory_bytes() + reserve > budget:
        least = needed - budget * SYSTEM_SHARE + fewest * record
        raise TenfoldError(_too_small(plan, max(least, peak_memory_bytes() + reserve)))
    return plan


def default_budget(process: int) -> int:
    """What this process may hold where nobody says: what it has, and most of what is free."""
    free = available_bytes()
    return 1 << 62 if free is None else process + int(free * (1 - FREE_SHARE))


def _too_small(plan: Plan, least: float) -> str:
    smallest = math.ceil((least / (1 - SYSTEM_SHARE) + NAMED_STEP) / NAMED_STEP) * NAMED_STEP
    return (
        f"a memory budget of {size(plan.budget)} is too small: the smallest that works is {smallest >> 20}MiB"
        f" (process {size(plan.process)}, weights of every token {size(plan.weights)}, KV cache"
        f" {size(plan.kv_cache)} for {plan.positions} tokens, scratch {size(plan.scratch)},"
        f" two experts {size(LEAST_SLOTS * plan.record)})"
    )


def always_bytes(config: ModelConfig, parts: Sequence[Part]) -> int:
    """Of weights that every token needs, in memory."""
    return sum(_always_bytes(part) for part in parts) + config.is_latent * _folded_bytes(config)


def _always_bytes(part: Part) -> int:
    """Panels as they are; plain tensors beside a float32 and a bf16 copy (`NativeLayers`)."""
    if isinstance(part, Experts):
        return 0
    if isinstance(part, Matrix):
        return whole_pages(part.num_bytes)
    return (4 + 4 + 2) * math.prod(part.shape)


def _folded_bytes(config: ModelConfig) -> int:
    """What `engine.latent` makes for every layer, and what it works in for one: float32, then panels."""
    rank, key, value = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    of_head = matrix_bytes("bf16", rank, key) + matrix_bytes("bf16", value, rank)
    work = 4 * rank * (key + value) + of_head
    return config.num_attention_heads * (config.num_hidden_layers * of_head + work)


def kv_cache_bytes(config: ModelConfig, room: Room) -> int:
    """Of `PackedBatchRunner`, with the tables that turn positions."""
    context = _blocks(room.context)
    tables = 4 * 4 * context * config.rotary_dim  # cos and sin, and as much while they are made
    heads, width, _ = cache_shape(config)
    return tables + config.num_hidden_layers * room.positions * 2 * 2 * heads * -(-width // WIDTH) * WIDTH


def scratch_bytes(config: ModelConfig, room: Room) -> int:
    """For the largest piece of a prompt to go through a layer, and for choosing tokens from the logits."""
    tokens = room.tokens
    rows = tokens * (_latent_rows(config) if config.is_latent else _attention_rows(config))
    attention = rows + 16 * (4 + 2) * _blocks(room.context) * compiled.cores()  # scores of a thread each
    stream = 4 * 4 * tokens * config.hidden_size
    routes = 4 * tokens * config.num_hidden_layers * config.num_experts_per_tok
    logits = (4 * room.batch + 48) * config.vocab_size
    if room.pass_tokens is not None:  # of drafts and of whole prompts, and what penalties count
        logits += LOGITS_BYTES + (4 * DRAFTS + 8) * room.batch * config.vocab_size
    return stream + attention + routes + _feed_forward_scratch(config, tokens) + logits


def _attention_rows(config: ModelConfig) -> int:
    """Of a token: queries, keys, values and what is made of them, rounded inputs of products."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    rounded = config.hidden_size + config.num_attention_heads * config.head_dim
    return 4 * heads * config.head_dim + 2 * rounded


def _latent_rows(config: ModelConfig) -> int:
    """Of a token (csrc/latent.cpp): queries as they are and folded, what they see and its values, compressed
    queries and their norm, its key, and rounded inputs of products."""
    _, wide, _ = cache_shape(config)
    values = config.num_attention_heads * config.v_head_dim
    floats = config.qk_width + 2 * config.num_attention_heads * wide + values + 2 * config.q_lora_rank + wide
    return 4 * floats + 2 * (config.hidden_size + config.q_lora_rank + values)


def _feed_forward_scratch(config: ModelConfig, tokens: int) -> int:
    """csrc/experts.cpp: what goes in and through filled slots, as floats and rounded; then shared ones."""
    D, F, K = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    dense = max(config.intermediate_size, config.shared_width)
    sparse = tokens * (K * ((4 + 2) * (D + F) + 16) + 2 * 4 * config.num_experts) if config.is_sparse else 0
    return sparse + tokens * (4 * D + (3 * 4 + 2) * dense)
