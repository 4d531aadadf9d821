"""How long from a packed model on disk to its first token?

    python benchmarks/packed_load.py MODEL [--rounds 5] [--json]

MODEL is a directory that `tenfold pack` wrote, of any size: the target of one second is for 4 GB with its
files in the system's cache, where the first round brings them. Every round is a process of its own; the
clock starts once Python has imported tenfold's engine, whose import is timed beside it. The prompt is one
token.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

TARGET = 1.0
RUN = """
import sys, time
start = time.perf_counter()
import torch
from tenfold.engine.packed import PackedRunner
from tenfold.packed import load_packed
ready = time.perf_counter()
runner = PackedRunner(load_packed(sys.argv[1]), 1, 64)
int(runner.forward(torch.tensor([[0]])).argmax())
print(ready - start, time.perf_counter() - ready)
"""


def seconds(model: Path) -> tuple[float, float]:
    """To import, and from there to the first token."""
    done = subprocess.run([sys.executable, "-c", RUN, model], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    imported, loaded = map(float, done.stdout.split())
    return imported, loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rounds = [seconds(arguments.model) for _ in range(arguments.rounds + 1)][1:]
    imported, loaded = (statistics.median(times) for times in zip(*rounds, strict=True))
    size = sum(file.stat().st_size for file in arguments.model.glob("*.safetensors"))
    rows = [
        {"name": f"first token of {size / 1e9:.2f} GB", "ours": loaded, "target": TARGET},
        {"name": "imports before it", "ours": imported, "target": None},
    ]
    rows = [row | {"peer": None, "ratio": None, "unit": "s"} for row in rows]
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(
            f"{row['name']:<28} {row['ours']:.3f} s"
            + (f"  (target {row['target']})" if row["target"] else "")
        )


if __name__ == "__main__":
    main()
