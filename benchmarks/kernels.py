"""How near do the kernels come to what the machine can do?

    python benchmarks/kernels.py [--shape olmoe-1b-7b] [--threads N] [--rounds 7] [--json]

`linear` and `experts` of one layer of the shape, in every format, for 1 to 512 tokens: weights read a second
beside the memory's speed, and operations a second beside the peak of the format's products. The weights
of several layers are used in turn, more than the caches hold. Experts are chosen at random, and counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tenfold.bench import ceilings
from tenfold.bench.subject import cut
from tenfold.bench.threads import use_threads
from tenfold.config import ModelConfig
from tenfold.engine.random_weights import random_packed
from tenfold.formats import Packing
from tenfold.kernels import native
from tenfold.packed import PackedExperts, PackedMatrix, PackedModel
from tenfold.panels import FORMATS
from tenfold.presets import load_preset
from tenfold.switch_config import decoder_only

TOKENS = (1, 8, 16, 64, 512)
LAYERS = 4
Call = Callable[[int], tuple[int, int]]
"""Runs a kernel, on weights that the number chooses; bytes of them it read and operations it did."""
Row = dict[str, Any]


def linear_call(matrices: list[PackedMatrix], tokens: int) -> Call:
    x_TK = torch.randn(tokens, matrices[0].columns)

    def call(turn: int) -> tuple[int, int]:
        matrix = matrices[turn % len(matrices)]
        native.linear(matrix, x_TK)
        return matrix.panels.nbytes, 2 * tokens * matrix.rows * matrix.columns

    return call


def experts_call(layers: list[PackedExperts], tokens: int, per_token: int) -> Call:
    E, D, F = len(layers[0].records), layers[0].hidden_size, layers[0].width
    x_TD, weights_TK = torch.randn(tokens, D), torch.rand(tokens, per_token)
    choices = [torch.rand(tokens, E).topk(per_token).indices for _ in layers]
    touched = [len(ids_TK.unique()) for ids_TK in choices]

    def call(turn: int) -> tuple[int, int]:
        turn %= len(layers)
        native.experts(layers[turn], x_TD, choices[turn], weights_TK)
        return touched[turn] * layers[turn].records.shape[1], 2 * tokens * per_token * 3 * D * F

    return call


def measure(call: Call, rounds: int) -> tuple[float, float]:
    """Median bytes and operations a second, after one call that is not counted."""
    call(0)
    reads, operations = [], []
    for turn in range(1, rounds + 1):
        start = time.perf_counter()
        size, done = call(turn)
        took = time.perf_counter() - start
        reads.append(size / took)
        operations.append(done / took)
    return statistics.median(reads), statistics.median(operations)


def calls(model: PackedModel, config: ModelConfig, tokens: int) -> dict[str, Call]:
    """One of each kernel, by what it multiplies; matrices of the same sizes are used in turn."""
    by_label: dict[str, list[Any]] = {}
    for name, weight in model.weights.items():
        if isinstance(weight, PackedExperts):
            by_label.setdefault("experts", []).append(weight)
        elif isinstance(weight, PackedMatrix) and name != "embed_tokens.weight":
            by_label.setdefault(f"linear {weight.rows}x{weight.columns}", []).append(weight)
    return {
        label: experts_call(weights, tokens, config.num_experts_per_tok)
        if label == "experts"
        else linear_call(weights, tokens)
        for label, weights in by_label.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="olmoe-1b-7b")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    threads = use_threads(arguments.threads)
    config = decoder_only(load_preset(arguments.shape), arguments.shape)
    config = cut(config, min(LAYERS, config.num_hidden_layers))
    limits = ceilings.measure(threads, None)
    memory = limits["read_bandwidth_bytes_per_second"]
    rows: list[Row] = []
    for form in FORMATS:
        rest = "q4" if form == "mxfp4" else form
        model = random_packed(config, Packing.model_validate({"experts": form, "rest": rest}))
        peak = limits["bf16_flops_per_second" if form == "bf16" else "int8_ops_per_second"]
        for tokens in TOKENS:
            for name, call in calls(model, config, tokens).items():
                if form == rest or name == "experts":
                    read, done = measure(call, arguments.rounds)
                    rows.append(row(f"{name} {form}", tokens, (read, memory), (done, peak)))
                    if not arguments.json:
                        print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"threads": threads, **limits, "rows": rows}))


def row(name: str, tokens: int, read: tuple[float, float], done: tuple[float, float | None]) -> Row:
    return {
        "name": name,
        "tokens": tokens,
        "bytes_per_second": read[0],
        "fraction_of_bandwidth": read[0] / read[1],
        "ops_per_second": done[0],
        "fraction_of_peak": done[0] / done[1] if done[1] else None,
    }


def line(found: Row) -> str:
    peak = f"{100 * found['fraction_of_peak']:>4.0f}%" if found["fraction_of_peak"] is not None else ""
    return (
        f"{found['name']:<26} {found['tokens']:>4} tokens"
        f" {found['bytes_per_second'] / 1e9:>8.2f} GB/s {100 * found['fraction_of_bandwidth']:>4.0f}%"
        f" {found['ops_per_second'] / 1e9:>8.1f} GOP/s {peak}"
    )


if __name__ == "__main__":
    main()
