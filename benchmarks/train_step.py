"""How fast does a training step of the sparse model go, beside its dense twin and transformers?

    python benchmarks/train_step.py [--rounds 12] [--json]

One step is forward, cross-entropy, balance losses, backward and optimizer, on fresh windows of the
standard library's source, at the demo's shape, batch and precision. Two comparisons, one after the
other; within each the sides take turns in every round, forwards and backwards, and medians are compared.
First the sparse model against its dense twins, with Muon, as the demo trains. Then against transformers,
with AdamW on both sides: its eager and grouped_mm experts run, with its own auxiliary loss, and the
faster counts (its batched_mm, which copies an expert for every token, was twenty times slower: LOG.md).
Both sides get the allocator setting that tenfold trains with.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from tenfold.checkpoint.families import family_for
from tenfold.config import ModelConfig
from tenfold.device import autocast, keep_freed_memory, pick_precision
from tenfold.model.transformer import Transformer
from tenfold.train.data import TokenData, TrainOrder, prepare
from tenfold.train.loss import backward
from tenfold.train.optimizer import build_optimizers
from tenfold.train.settings import TrainSettings, resolve_config

PEER_EXPERTS = ("eager", "grouped_mm")
WARM_UP = 8
"""Rounds until oneDNN has compiled products for most of the loads that experts get."""
Step = Callable[[torch.Tensor, torch.Tensor], None]


def our_step(config: ModelConfig, settings: TrainSettings) -> Step:
    model = Transformer(config).init_weights(0)
    optimizers = build_optimizers(model, settings)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        backward(model, inputs, targets, settings)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def peer_step(config: ModelConfig, settings: TrainSettings, experts: str) -> Step:
    """transformers' model of the family that `config` is saved as."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = family_for(config).to_hf(config) | {
        "output_router_logits": True,
        "router_aux_loss_coef": settings.balance_loss,
        "use_cache": False,
    }
    peer_config = AutoConfig.for_model(**raw)
    model = AutoModelForCausalLM.from_config(peer_config, experts_implementation=experts)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, fused=True)

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with autocast(inputs.device, settings.precision):
            out = model(input_ids=inputs, labels=targets, shift_labels=targets)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    steps: dict[str, Step], data: TokenData, settings: TrainSettings, rounds: int
) -> dict[str, float]:
    """Median tokens a second of each, taking turns, after WARM_UP rounds."""
    order = TrainOrder(data.train, settings.seq_len, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + WARM_UP):
        inputs, targets = order.batch(turn * settings.batch_size, settings.batch_size)
        # Whoever follows a larger model finds colder caches: every other round goes backwards.
        for name, step in [*steps.items()][:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            step(inputs, targets)
            seconds[name].append(time.perf_counter() - start)
    return {name: settings.step_tokens / statistics.median(s[WARM_UP:]) for name, s in seconds.items()}


def rows(speed: dict[str, float]) -> list[dict[str, Any]]:
    peer = max(speed[f"transformers {experts}"] for experts in PEER_EXPERTS)

    def row(name: str, ours: float, other: float | None, target: float | None) -> dict[str, Any]:
        ratio = ours / other if other else None
        return {
            "name": name,
            "ours": ours,
            "peer": other,
            "ratio": ratio,
            "target": target,
            "unit": "tok/s",
        }

    best = max(PEER_EXPERTS, key=lambda experts: speed[f"transformers {experts}"])
    return [
        row(f"sparse against transformers ({best})", speed["sparse adamw"], peer, 1.3),
        row("sparse against equal-active dense twin", speed["sparse"], speed["dense_active"], 0.8),
        *(row(name, value, None, None) for name, value in speed.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()
    precision = pick_precision("auto", torch.device("cpu"))
    muon = TrainSettings(precision=precision)
    adamw = muon.model_copy(update={"optimizer": "adamw"})
    sparse = resolve_config(muon)
    data = prepare(muon.data, None, sparse.vocab_size)
    twins = {
        "sparse": our_step(sparse, muon),
        "dense_active": our_step(sparse.dense_twin("active"), muon),
        "dense_total": our_step(sparse.dense_twin("total"), muon),
    }
    peers = {
        "sparse adamw": our_step(sparse, adamw),
        **{f"transformers {experts}": peer_step(sparse, adamw, experts) for experts in PEER_EXPERTS},
    }
    speed = measure(twins, data, muon, arguments.rounds)
    speed |= measure(peers, data, adamw, arguments.rounds)
    table = rows(speed)
    if arguments.json:
        print(json.dumps({"rows": table}))
        return
    for row in table:
        ratio = f"{row['ratio']:.2f}x (target {row['target']})" if row["ratio"] else ""
        peer = f"{row['peer']:>9,.0f}" if row["peer"] else " " * 9
        print(f"{row['name']:<48} {row['ours']:>9,.0f} {peer} {row['unit']}  {ratio}")


if __name__ == "__main__":
    main()
