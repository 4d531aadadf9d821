"""Does the sparse model beat its equal-active dense twin whatever the seed?

    python benchmarks/seeds.py [--seeds 3] [--json]

Trains both with the demo's settings for each seed (initial weights and order of the data), about
four minutes a seed on two cores. "ours" is the sparse model's validation bits per byte, "peer" its
equal-active twin's; less is better, and the target is a ratio of 0.98 or less.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from tenfold.compare import three_configs
from tenfold.train.data import prepare, with_tokenizer
from tenfold.train.settings import TrainSettings, resolve_config
from tenfold.train.trainer import Trainer


def bits_per_byte(settings: TrainSettings, folder: Path) -> dict[str, float]:
    """Of the sparse model and its equal-active twin, trained in `folder`."""
    config = resolve_config(settings)
    data = prepare(settings.data, settings.tokenizer, config.vocab_size)
    configs = three_configs(with_tokenizer(config, data))
    found = {}
    for name in ("sparse", "dense_active"):
        trainer = Trainer(configs[name], settings, data, folder / name, resume=False)
        found[name] = trainer.run(f"{name}, seed {settings.seed}")["val_bits_per_byte"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Sparse against its equal-active dense twin, by seed.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            bits = bits_per_byte(TrainSettings(seed=seed), Path(folder))
        ratio = bits["sparse"] / bits["dense_active"]
        row: dict[str, Any] = {"name": f"seed {seed}", "unit": "bits/byte", "target": 0.98}
        rows.append(row | {"ours": bits["sparse"], "peer": bits["dense_active"], "ratio": ratio})
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        fewer = f"{1 - row['ratio']:.1%} fewer"
        print(f"{row['name']:<8} {row['ours']:.4f} against {row['peer']:.4f} bits/byte: {fewer}")


if __name__ == "__main__":
    main()
