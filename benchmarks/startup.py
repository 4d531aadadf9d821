"""How long until `import tenfold` and `tenfold --help` answer?

    python benchmarks/startup.py [--rounds 10] [--json]

Whole processes are timed, in turn; "ours" is the median in seconds, and the target is at most this
many seconds. Bare python is there for scale.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

TARGET = 0.5
RUN = "import sys; sys.argv = ['tenfold', '--help']; from tenfold.cli import main; main()"
COMMANDS = {"python": ("pass", None), "import": ("import tenfold", TARGET), "--help": (RUN, TARGET)}


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up time of the command line.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.rounds):
        for name, (code, _) in COMMANDS.items():
            times[name].append(seconds(code))
    rows = [
        {
            "name": name,
            "ours": statistics.median(times[name]),
            "peer": None,
            "ratio": None,
            "target": target,
            "unit": "s",
        }
        for name, (_, target) in COMMANDS.items()
    ]
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(f"{row['name']:<8} {row['ours']:.3f} s  (target {row['target']})")


if __name__ == "__main__":
    main()
