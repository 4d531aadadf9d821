"""What does a router give up so that tokens reuse experts, and what is gained when experts are streamed?

    python benchmarks/locality.py [--weights 0 0.1 0.3 1] [--tokens 2000000] [--seed 0] [--json]

Trains the demo's sparse model once for each weight of the locality loss, about two minutes each on two
cores, then traces it on held-out text. "ours" is the share of uses that find their expert in memory, with
room for 25% or 50% of the experts, least frequently used let go; "peer" that of the first weight's model.
Rows of unit bits/byte are what it costs.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from tenfold.checkpoint import load_decoder_only
from tenfold.trace.analysis import hit_rates
from tenfold.trace.record import trace_of
from tenfold.train.data import prepare, with_tokenizer
from tenfold.train.settings import TrainSettings, resolve_config
from tenfold.train.trainer import Trainer

TRACED_TOKENS = 16_384
MEMORY = (0.25, 0.5)


def trained(settings: TrainSettings, folder: Path) -> dict[str, float]:
    """Held-out bits per byte and hit rates of a model trained in `folder`."""
    config = resolve_config(settings)
    data = prepare(settings.data, settings.tokenizer, config.vocab_size)
    trainer = Trainer(with_tokenizer(config, data), settings, data, folder, resume=False)
    result = trainer.run(f"locality loss {settings.locality_loss:g}")
    windows = data.validation_batches(settings.seq_len, 1)
    texts = [inputs[0] for inputs, _ in islice(windows, TRACED_TOKENS // settings.seq_len)]
    trace = trace_of(load_decoder_only(folder / "model"), "demo", {"held-out": texts})
    found = {f"hit rate at {row['memory']:.0%}": row["lfu"] for row in hit_rates(trace, MEMORY)}
    return {"bits/byte": result["val_bits_per_byte"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss against hit rate, by weight of the locality loss.")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 0.3, 1.0])
    parser.add_argument("--tokens", type=int, default=TrainSettings().tokens)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = []
    for weight in arguments.weights:
        settings = TrainSettings(locality_loss=weight, tokens=arguments.tokens, seed=arguments.seed)
        with tempfile.TemporaryDirectory() as folder:
            found.append(trained(settings, Path(folder) / "run"))
    rows: list[dict[str, Any]] = [
        {"name": f"locality loss {weight:g}", "unit": unit, "ours": ours, "peer": found[0][unit]}
        for weight, values in zip(arguments.weights, found, strict=True)
        for unit, ours in values.items()
    ]
    if arguments.json:
        print(json.dumps({"rows": [row | {"ratio": row["ours"] / row["peer"]} for row in rows]}))
        return
    for weight, values in zip(arguments.weights, found, strict=True):
        shown = ", ".join(f"{unit} {value:.4f}" for unit, value in values.items())
        print(f"locality loss {weight:<5g} {shown}")


if __name__ == "__main__":
    main()
