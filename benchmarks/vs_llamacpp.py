"""Is tenfold faster than llama.cpp, transformers and its own dense twins, and are its formats as good?

    python benchmarks/vs_llamacpp.py [--only decode ...] [--layers 16] [--rounds 5] [--folder F] [--json]

The OLMoE-1B-7B shape with random weights, the same for tenfold and llama.cpp (olmoe_gguf.py), and the same
number of threads. In every round the sides take turns, forwards and backwards; medians are compared.
llama.cpp computes every matrix in its one format (4.5 bits a weight in Q4_0, 8.5 in Q8_0), tenfold in its
own (4.27 and 8.27 with 2,048 columns). Decoding follows a prompt of 16 tokens, and the tokens are random, so
that sequences do not choose the same experts. Perplexity is SmolLM2-135M's (perplexity.py). The load time
of a packed model is packed_load.py's.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from llama import LlamaRunner
from olmoe_gguf import write_olmoe
from perplexity import perplexity_rows
from rows import Row, preset, print_rows, row

from tenfold import compiled
from tenfold.bench.speed import one_round, random_ids
from tenfold.bench.subject import cut
from tenfold.bench.threads import use_threads
from tenfold.checkpoint.families import family_for
from tenfold.config import ModelConfig
from tenfold.engine.packed import PackedRunner
from tenfold.engine.random_weights import random_packed, random_packed_bytes
from tenfold.engine.reading import Reading
from tenfold.engine.runner import Runner
from tenfold.formats import Packing
from tenfold.memory import available_bytes
from tenfold.packed import PackedExperts, PackedModel

SHORT, LONG = 16, 512
"""Tokens of the prompt before decoding, and of the one whose prefill is measured."""
DECODED = 64
TWINS_SHARE = 0.85
"""Of the free memory, which a sparse model and its dense twin may take together."""
Kind = Literal["prefill", "decode"]


class Bench:
    """What every part needs: the shape, the threads, the rounds, and a folder for GGUF files."""

    def __init__(self, arguments: argparse.Namespace):
        self.config = cut(preset("olmoe-1b-7b"), arguments.layers)
        self.rounds: int = arguments.rounds
        self.folder: Path = arguments.folder
        self.threads = use_threads(arguments.threads)

    def gguf(self, form: str) -> Path:
        """The shape's random weights in one of ggml's formats, written once."""
        file = self.folder / f"olmoe-{self.config.num_hidden_layers}-{form}.gguf"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_olmoe(file, self.config, form)
        return file

    def race(self, sides: dict[str, Runner], kind: Kind, batch: int, vocab_size: int) -> dict[str, float]:
        """Median tokens a second of each side, summed over the batch, after one round that is not counted."""
        prompt, tokens = (LONG, 1) if kind == "prefill" else (SHORT, DECODED)
        ids_BS = random_ids(vocab_size, batch, prompt + tokens)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(self.rounds + 1):
            for name, runner in [*sides.items()][:: -1 if turn % 2 else 1]:
                took = one_round(runner, ids_BS, prompt)
                tokens_done, seconds = (prompt, took.prefill) if kind == "prefill" else (1, took.decode_step)
                speeds[name].append(batch * tokens_done / seconds)
        return {name: statistics.median(found[1:]) for name, found in speeds.items()}

    def against_llama(self, ours: str, theirs: str, kind: Kind, batch: int, target: float) -> Iterator[Row]:
        """tenfold with all matrices in `ours` against llama.cpp in `theirs`; one sequence that is decoded
        against plain reading of the same weights too."""
        capacity = LONG + 1 if kind == "prefill" else SHORT + DECODED
        peer = LlamaRunner(self.gguf(theirs), batch, capacity, self.threads)
        model = random_packed(self.config, Packing.model_validate({"experts": ours, "rest": ours}))
        sides: dict[str, Runner] = {"ours": PackedRunner(model, batch, capacity), "peer": peer}
        speed = self.race(sides, kind, batch, self.config.vocab_size)
        peer.close()
        what = f"{kind}, {batch} sequences" if batch > 1 else kind
        yield row(f"{what}: {ours} against {theirs}", speed["ours"], speed["peer"], target)
        if what == "decode":
            yield self.against_memory(f"decode: {ours} weights against memory read", sides["ours"], model)

    def against_memory(self, name: str, runner: Runner, model: PackedModel) -> Row:
        """Decoding, and in turn with it a plain pass over the experts, which are nearly all of the model."""
        ids_BS = random_ids(self.config.vocab_size, 1, SHORT + DECODED)
        per_token = Reading.of(self.config, model.weights, 1).bytes_per_step
        records = [weight.records for weight in model.weights.values() if isinstance(weight, PackedExperts)]
        decoded, plain = [], []
        for _ in range(self.rounds):
            decoded.append(per_token / one_round(runner, ids_BS, SHORT).decode_step)
            reads = [compiled.module().read_seconds(self.threads, e.data_ptr(), e.nbytes) for e in records]
            plain.append(sum(each.nbytes for each in records) / sum(reads))
        return row(name, statistics.median(decoded) / 1e9, statistics.median(plain) / 1e9, 0.9, "GB/s")


def decode(bench: Bench) -> Iterator[Row]:
    yield from bench.against_llama("q4", "Q4_0", "decode", 1, 1.0)
    yield from bench.against_llama("q8", "Q8_0", "decode", 1, 1.0)


def prefill(bench: Bench) -> Iterator[Row]:
    yield from bench.against_llama("q4", "Q4_0", "prefill", 1, 2.3)


def batches(bench: Bench) -> Iterator[Row]:
    yield from bench.against_llama("q4", "Q4_0", "decode", 8, 1.5)
    yield from bench.against_llama("q4", "Q4_0", "decode", 16, 2.2)


class TransformersRunner:
    """Prefill alone: no cache is kept between calls."""

    def __init__(self, config: ModelConfig, experts: str):
        from transformers import AutoConfig, AutoModelForCausalLM

        peer = AutoConfig.for_model(**family_for(config).to_hf(config), dtype="bfloat16")
        self.model = AutoModelForCausalLM.from_config(peer, experts_implementation=experts).eval()

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids_BS, use_cache=False, logits_to_keep=1).logits
        return logits

    def reset(self) -> None:
        pass


def transformers(bench: Bench) -> Iterator[Row]:
    """Four layers at most: in bf16 the whole shape takes 14 GB, and there are three sides."""
    config = cut(bench.config, min(4, bench.config.num_hidden_layers))
    packed = random_packed(config, Packing(experts="bf16", rest="bf16"))
    peers = {experts: TransformersRunner(config, experts) for experts in ("eager", "grouped_mm")}
    sides: dict[str, Runner] = {"ours": PackedRunner(packed, 1, LONG + 1), **peers}
    speed = bench.race(sides, "prefill", 1, config.vocab_size)
    best = max(peers, key=lambda experts: speed[experts])
    layers = config.num_hidden_layers
    yield row(f"prefill in bf16, {layers} layers: transformers {best}", speed["ours"], speed[best], 1.5)


def twins(bench: Bench) -> Iterator[Row]:
    yield _twin(bench, bench.config, 5.0)
    yield _twin(bench, _fitting(preset("qwen3-30b-a3b")), 8.0)


def _twin(bench: Bench, sparse: ModelConfig, target: float) -> Row:
    packing, capacity = Packing(experts="q4", rest="q4"), SHORT + DECODED
    shapes = {"ours": sparse, "peer": sparse.dense_twin("total")}
    sides: dict[str, Runner] = {
        name: PackedRunner(random_packed(config, packing), 1, capacity) for name, config in shapes.items()
    }
    speed = bench.race(sides, "decode", 1, sparse.vocab_size)
    name = f"{family_for(sparse).architecture}, {sparse.num_hidden_layers} layers: decode against dense twin"
    return row(name, speed["ours"], speed["peer"], target)


def _fitting(config: ModelConfig) -> ModelConfig:
    """As many layers as fit the memory beside their dense twin."""
    room = TWINS_SHARE * (available_bytes() or 1 << 34)
    share = room / (2 * random_packed_bytes(config, Packing(experts="q4", rest="q4")))
    return cut(config, max(1, int(config.num_hidden_layers * min(1, share))))


def perplexity(bench: Bench) -> Iterator[Row]:
    return (row(*found, unit="perplexity") for found in perplexity_rows(bench.folder))


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (decode, prefill, batches, transformers, twins, perplexity)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tenfold-gguf")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    print_rows({name: PARTS[name] for name in arguments.only}, Bench(arguments), arguments.json)


if __name__ == "__main__":
    main()
