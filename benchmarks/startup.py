"""How long until `import tenfold` and `tenfold --help` answer?

    python benchmarks/startup.py [--rounds 10] [--json]

Whole processes are timed, in turn; "ours" is the median in seconds, less is better, "peer" is the
same interpreter doing nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

TARGET = 0.5
COMMANDS = {
    "python -c pass": "pass",
    "import tenfold": "import tenfold",
    "tenfold --help": "import sys; sys.argv = ['tenfold', '--help']; from tenfold.cli import main; main()",
}


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
        for name, code in COMMANDS.items():
            times[name].append(seconds(code))
    median = {name: statistics.median(values) for name, values in times.items()}
    peer = median.pop("python -c pass")
    rows = [
        {"name": name, "ours": t, "peer": peer, "ratio": t / peer, "target": TARGET, "unit": "s"}
        for name, t in median.items()
    ]
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(f"{row['name']:<16} {row['ours']:.3f} s (target {TARGET} s; bare python {peer:.3f} s)")


if __name__ == "__main__":
    main()
