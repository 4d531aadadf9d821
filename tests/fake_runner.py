"""A model that costs nothing: its logits are a hash of the tokens that it reads back from its block cache.

A wrong block table, a stale prefix, a wrong start or a block given to two sequences shows as wrong tokens;
`expected` says what is right. For tests of the scheduler, of the engines and of the server.
"""

import time
import weakref
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from tenfold.chat_template import ChatTemplate
from tenfold.config import ModelConfig
from tenfold.engine.async_engine import AsyncLLM
from tenfold.engine.batch import Chunk, Outcome
from tenfold.engine.sampler import Sampler
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

UNCLEARED, EMPTY = -2, -1
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def fake_config(vocab_size: int, context: int = 4096) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context,
        num_hidden_layers=3,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=(0,),
        eos_token_id=0,
    )


def fake_tokenizer() -> Tokenizer:
    raw = train_bpe(iter(["the cat sat on the mat, and the dog looked on", "café ☕ naïve"]), 320)
    template = ChatTemplate({"default": TEMPLATE}, "fake")
    return Tokenizer(raw, {"eos_token": END_OF_TEXT}, chat_template=template)


def logits_of(history: Sequence[int], vocab_size: int) -> Tensor:
    """Of the token after these. Short cycles are likely, so that look-up finds something to guess, and so is
    the end of the text now and then."""
    digest = blake2b(repr(list(history[-3:])).encode(), digest_size=4).digest()
    whole = blake2b(repr(list(history)).encode(), digest_size=4).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 997)
    logits = 3 * torch.randn(vocab_size, generator=rng)
    rng.manual_seed(int.from_bytes(whole, "little"))
    return logits + 0.5 * torch.randn(vocab_size, generator=rng)


def expected(
    prompt: Sequence[int], params: SamplingParams, config: ModelConfig, index: int = 0, context: int = 4096
) -> list[int]:
    """The tokens that a request alone gets, stop strings left aside."""
    ids, sampler = list(prompt), Sampler(params, prompt, index)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else config.eos_token_ids)}
    for _ in range(min(params.max_tokens, context - len(prompt))):
        token = sampler(logits_of(ids, config.vocab_size))
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


class FakeRunner:
    """A `BatchRunner`. `broken` are tokens that no pass survives; `seconds` are slept for each token and
    layer, and `passes` is what went through: (tokens, whether logits were wanted of all chunks)."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int = 256,
        block_size: int = 16,
        max_tokens: int = 512,
        seconds: float = 0.0,
    ):
        self.config, self.num_blocks, self.block_size = config, num_blocks, block_size
        self.max_tokens, self.seconds = max_tokens, seconds
        self.broken: set[int] = set()
        self.passes: list[list[Chunk]] = []
        self.flying: weakref.WeakSet[FakePass] = weakref.WeakSet()
        self.cache = torch.full((config.num_hidden_layers, num_blocks, block_size), UNCLEARED)

    def begin(self, chunks: Sequence[Chunk]) -> "FakePass":
        assert chunks and 0 < sum(len(chunk.ids) for chunk in chunks) <= self.max_tokens
        for chunk in chunks:
            assert chunk.ids and all(0 <= token < self.config.vocab_size for token in chunk.ids)
            assert 0 <= chunk.wanted <= len(chunk.ids)
            assert chunk.start + len(chunk.ids) <= len(chunk.blocks) * self.block_size
            assert len(set(chunk.blocks)) == len(chunk.blocks)
        new = FakePass(self, chunks)
        written = [block for other in (*self.flying, new) for block in other.written]
        assert len(set(written)) == len(written), "two passes write to one block"
        self.flying.add(new)
        self.passes.append(list(chunks))
        return new

    def clear(self, blocks: Sequence[int]) -> None:
        self.cache[:, list(blocks)] = EMPTY


class FakePass:
    def __init__(self, runner: FakeRunner, chunks: Sequence[Chunk]):
        self.runner, self.chunks = runner, [chunk._replace(blocks=list(chunk.blocks)) for chunk in chunks]
        size = runner.block_size
        self.written = [
            block
            for chunk in self.chunks
            for block in chunk.blocks[chunk.start // size : -(-(chunk.start + len(chunk.ids)) // size)]
        ]
        self.done = 0
        self.routes: list[Tensor] = []

    def advance(self, layers: int | None = None) -> bool:
        total = self.runner.config.num_hidden_layers
        for layer in range(self.done, total if layers is None else min(total, self.done + layers)):
            self.run(layer)
            self.done = layer + 1
        if self.done == total:
            self.runner.flying.discard(self)
        return self.done == total

    def run(self, layer: int) -> None:
        config, cache = self.runner.config, self.runner.cache[layer]
        time.sleep(self.runner.seconds * sum(len(chunk.ids) for chunk in self.chunks))
        for chunk in self.chunks:
            if self.runner.broken & set(chunk.ids):
                self.runner.flying.discard(self)
                raise TenfoldError("expert 3 of layer 1 is damaged")
            for position, token in enumerate(chunk.ids, chunk.start):
                block, at = divmod(position, self.runner.block_size)
                cache[chunk.blocks[block], at] = token * (layer + 1)
        if layer in config.sparse_layers:
            last = layer == config.num_hidden_layers - 1
            tokens = [
                token
                for chunk in self.chunks
                for token in chunk.ids[len(chunk.ids) - chunk.wanted if last else 0 :]
            ]
            routes = [[token % config.num_experts, -1] for token in tokens]
            self.routes.append(torch.tensor(routes, dtype=torch.int32).view(-1, 2))

    def logits(self) -> Tensor:
        assert self.done == self.runner.config.num_hidden_layers
        rows = [
            self.row(chunk, end)
            for chunk in self.chunks
            for end in range(chunk.start + len(chunk.ids) - chunk.wanted, chunk.start + len(chunk.ids))
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.runner.config.vocab_size)

    def draft(self, outcomes: Sequence[Outcome]) -> Sequence[int | None]:
        """That the token comes again."""
        for chunk, outcome in zip(self.chunks, outcomes, strict=True):
            assert 0 <= outcome.kept <= len(chunk.ids)
            assert not outcome.guess or outcome.kept
        return [outcome.next_id if outcome.guess else None for outcome in outcomes]

    def row(self, chunk: Chunk, last: int) -> Tensor:
        """After the token at position `last`: of what every layer's cache says was there."""
        by_layer = self.runner.cache[:, list(chunk.blocks)].flatten(1)
        if (by_layer == UNCLEARED).any():
            return torch.full((self.runner.config.vocab_size,), torch.nan)
        read = by_layer[:, : last + 1] // torch.arange(1, len(by_layer) + 1)[:, None]
        assert (read == read[0]).all(), "layers disagree"
        return logits_of(read[0].tolist(), self.runner.config.vocab_size)


def fake_engine(
    seconds: float = 0.0, context: int = 512, max_sequences: int = 16, max_queue: int = 64
) -> AsyncLLM:
    """An engine that serves nonsense; with a chat template."""
    tokenizer = fake_tokenizer()
    runner = FakeRunner(fake_config(tokenizer.vocab_size, context), seconds=seconds)
    return AsyncLLM(runner, tokenizer, "fake", context, max_sequences, max_queue)
