"""How fast is a model that does not fit, against llama.cpp's mmap, and is the budget ever exceeded?

    python benchmarks/streaming.py [--only decode67 ...] [--rounds 3] [--tokens 16] [--folder F] [--json]

The OLMoE-1B-7B shape with random weights, the same in tenfold's 4-bit pack and llama.cpp's Q4_0 file: the
worst case for a store, for a token's experts follow from it alone, and none is wanted more than another. Each
side is a process in a memory control group of its own with the same limit and no swap, and begins with its
file out of the page cache; llama.cpp does not repack, or it would be killed. The sides take turns, a round
each, after one that is not counted; tokens are random, and new in every round. The bound is the bytes of the
experts that were missing over the speed at which the disk gives records at random, measured before and after
each of our rounds. `contract` runs two layers in groups as large as their budgets, and in wider ones.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from memory_cgroup import Group, memory_group
from rich.console import Console
from rich.progress import track
from rows import Row, preset, print_rows, row

from tenfold.bench.disk import random_read_speed
from tenfold.bench.within import CHILD
from tenfold.checkpoint.pack.record import record_bytes
from tenfold.formats import Packing
from tenfold.memory import size

PROMPT, LONG = 16, 512
DISK_SECONDS = 0.5


class Side:
    """A process in a memory group that runs rounds on request. `kind` is ours, resident or llama."""

    def __init__(self, kind: str, model: Path, budget: int, capacity: int, stack: ExitStack):
        self.kind = kind
        for file in [model] if model.is_file() else sorted(model.iterdir()):
            _forget(file)
        self.group: Group = stack.enter_context(memory_group(budget))
        request = json.dumps({"kind": kind, "model": str(model), "budget": budget, "capacity": capacity})
        self.process = stack.enter_context(self.group.start([sys.executable, __file__, "--side", request]))
        stack.callback(self.process.kill)

    def round(self, prompt: int, tokens: int, seed: int) -> dict[str, Any]:
        """Seconds, and for ours what the meter counted."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([prompt, tokens, seed]) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.kind} ended with {self.process.wait()}; {self.group.kills} were killed")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _forget(file: Path) -> None:
    """Out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def side(request: dict[str, Any]) -> None:
    """The process: rounds as they are asked for on stdin, until its end."""
    from tenfold.bench.speed import metered_round, random_ids
    from tenfold.bench.threads import use_threads
    from tenfold.device import one_torch_thread
    from tenfold.engine.budget import Room
    from tenfold.engine.loading import load_packed_within
    from tenfold.engine.runner import Runner, new_runner
    from tenfold.engine.usage import Usage
    from tenfold.memory import Budget
    from tenfold.packed import load_packed

    threads, path, capacity = use_threads(None), Path(request["model"]), request["capacity"]
    runner: Runner
    model: Any = None
    if request["kind"] == "llama":
        from llama import LlamaRunner

        runner = peer = LlamaRunner(path, 1, capacity, threads, mapped=True)
        vocab_size = peer.vocab_size
    else:
        budget, room = Budget(request["budget"]), Room(1, capacity)
        model = load_packed_within(path, budget, room) if request["kind"] == "ours" else load_packed(path)
        runner, vocab_size = new_runner(model, 1, capacity), model.config.vocab_size
    for line in sys.stdin:
        prompt, tokens, seed = json.loads(line)
        usage = Usage(model)
        with one_torch_thread():
            metered_round(runner, random_ids(vocab_size, 1, prompt + tokens, seed), prompt, usage)
        print(json.dumps(usage.summary()), flush=True)


class Bench:
    def __init__(self, arguments: argparse.Namespace):
        self.rounds: int = arguments.rounds
        self.tokens: int = arguments.tokens
        self.folder: Path = arguments.folder
        self.runs: int = arguments.runs
        self.folder.mkdir(parents=True, exist_ok=True)

    def pack(self, name: str, rest: str = "q4", layers: int | None = None) -> Path:
        """Of random weights, written once."""
        from random_pack import write_random_pack

        from tenfold.bench.subject import cut

        out = self.folder / f"{name}-{layers or 'all'}-q4-{rest}"
        if not out.exists():
            config = cut(preset(name), layers)
            write_random_pack(out, config, Packing.model_validate({"experts": "q4", "rest": rest}))
        return out

    def gguf(self) -> Path:
        from olmoe_gguf import write_olmoe

        config = preset("olmoe-1b-7b")
        file = self.folder / f"olmoe-{config.num_hidden_layers}-Q4_0.gguf"
        if not file.exists():
            write_olmoe(file, config, "Q4_0")
        return file

    def race(
        self, sides: dict[str, tuple[str, Path]], budget: int, prompt: int, tokens: int
    ) -> dict[str, Any]:
        """Of each side the median seconds of a prompt and of a decoded token, and the summaries of ours."""
        with ExitStack() as stack:
            running = {}
            for name, (kind, model) in sides.items():
                room = max(budget, 2 * _model_bytes(model)) if kind == "resident" else budget
                running[name] = Side(kind, model, room, prompt + tokens, stack)
            files = sorted(sides["ours"][1].glob("*.safetensors"))
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            disk = []
            for turn in range(self.rounds + 1):
                for name, each in [*running.items()][:: -1 if turn % 2 else 1]:
                    before = _disk(files, 2 * turn) if name == "ours" else 0
                    found[name].append(each.round(prompt, tokens, turn))
                    if name == "ours":
                        disk.append((before + _disk(files, 2 * turn + 1)) / 2)
            peaks = {name: each.group.peak for name, each in running.items()}
        counted = {name: each[1:] for name, each in found.items()}
        return {
            "seconds": {
                name: {
                    part: statistics.median(one[part]["seconds"] / one[part]["tokens"] for one in each)
                    for part in ("prompt", "decode")
                }
                for name, each in counted.items()
            },
            "ours": counted["ours"],
            "disk": statistics.mean(disk[1:]),
            "peaks": peaks,
        }


def _against_llama(bench: Bench, percent: int, part: str, target: float) -> Iterator[Row]:
    model = bench.pack("olmoe-1b-7b")
    budget = _model_bytes(model) * percent // 100
    prompt, tokens = (LONG, 1) if part == "prompt" else (PROMPT, bench.tokens)
    sides = {"ours": ("ours", model), "llama": ("llama", bench.gguf())}
    found = bench.race(sides, budget, prompt, tokens)
    speed = {name: 1 / seconds[part] for name, seconds in found["seconds"].items()}
    what = {"prompt": f"prefill of {LONG}", "decode": "decode"}[part]
    name = f"{what} at {percent}% of the model ({size(budget)}) against llama.cpp"
    yield row(name, speed["ours"], speed["llama"], target)
    yield _of_bound(f"{what} at {percent}% against the disk's bound", found, part)
    peak = found["peaks"]["ours"]
    yield row(f"{what} at {percent}%: peak of the group", peak / 1e9, budget / 1e9, None, "GB")


def _of_bound(name: str, found: dict[str, Any], part: str) -> Row:
    """Tokens a second against what the disk would allow alone, both over all rounds."""
    spent = [each[part] for each in found["ours"]]
    tokens = sum(each["tokens"] for each in spent)
    missed = sum(each["missed_bytes_per_token"] * each["tokens"] for each in spent)
    ours, bound = tokens / sum(each["seconds"] for each in spent), tokens * found["disk"] / missed
    return row(name, ours, bound, 0.7)


def decode67(bench: Bench) -> Iterator[Row]:
    yield from _against_llama(bench, 67, "decode", 2.0)


def decode40(bench: Bench) -> Iterator[Row]:
    yield from _against_llama(bench, 40, "decode", 5.0)


def prefill40(bench: Bench) -> Iterator[Row]:
    yield from _against_llama(bench, 40, "prompt", 5.0)


def bound(bench: Bench) -> Iterator[Row]:
    """Without llama.cpp, for the disk slows down for whoever reads as much. A prompt's arithmetic may take
    longer than its reading: then the resident engine is the bound."""
    model = bench.pack("olmoe-1b-7b")
    for percent in (25, 40, 55, 67, 85):
        budget = _model_bytes(model) * percent // 100
        for part, prompt, tokens in (("decode", PROMPT, 4 * bench.tokens), ("prompt", LONG, 1)):
            sides = {"ours": ("ours", model), "resident": ("resident", model)}
            found = bench.race(sides, budget, prompt, tokens)
            what = f"{'decode' if part == 'decode' else f'prefill of {LONG}'} at {percent}%"
            of_disk = _of_bound(f"{what} against the disk's bound", found, part)
            lesser = min(of_disk["peer"], 1 / found["seconds"]["resident"][part])
            yield of_disk
            yield row(
                f"{what} against the lesser of that and the resident speed",
                of_disk["ours"],
                lesser,
                0.7,
            )


def resident(bench: Bench) -> Iterator[Row]:
    """A budget above the model, against the engine without one."""
    model = bench.pack("olmoe-1b-7b")
    sides = {"ours": ("ours", model), "resident": ("resident", model)}
    found = bench.race(sides, 2 * _model_bytes(model), PROMPT, max(bench.tokens, 64))
    ours, peer = (1 / found["seconds"][name]["decode"] for name in sides)
    yield row("decode with a budget above the model against none", ours, peer, 0.97)


def qwen30b(bench: Bench) -> Iterator[Row]:
    """17 GB on 8 GiB: that it runs, inside the budget, and how fast."""
    budget = 8 << 30
    found = bench.race({"ours": ("ours", bench.pack("qwen3-30b-a3b"))}, budget, PROMPT, bench.tokens)
    speed, peak = 1 / found["seconds"]["ours"]["decode"], found["peaks"]["ours"]
    yield row("Qwen3-30B-A3B's shape on 8 GiB: decode", speed, None, None)
    yield row("Qwen3-30B-A3B's shape on 8 GiB: peak of the group", peak / 1e9, budget / 1e9, None, "GB")


def contract(bench: Bench) -> Iterator[Row]:
    """Random budgets, prompts and batches: how many were killed, or held more than their budget."""
    dice, exceeded, most = random.Random(0), 0, 0.0
    models = [bench.pack("olmoe-1b-7b", rest, 2) for rest in ("q4", "q8")]
    console = Console(stderr=True)
    for _ in track(range(bench.runs), "contract", console=console):
        settings = {
            "prompt_tokens": dice.choice((1, 7, 100, 1500)),
            "tokens": dice.randint(1, 8),
            "batch": dice.choice((1, 2, 16)),
            "threads": dice.choice((1, None)),
        }
        request = {"model": str(dice.choice(models)), "settings": settings, "budget": 1, "reserve": 0}
        least = _least(_within(request, 8 << 30)[0]["error"])
        budget = request["budget"] = int(least * dice.choice((1, 1, dice.uniform(1, 2))))
        for limit in (budget, 4 * budget):  # in the wide one the peak may show what the narrow one hides
            answer, peak, kills = _within(request, limit)
            over = "error" in answer or kills > 0 or peak > budget
            exceeded, most = exceeded + over, max(most, peak / budget)
            verdict = f"exceeded: {kills} killed, {answer.get('error')}" if over else "kept"
            console.print(f"{verdict}, {peak / budget:.3f} of {size(budget)} in {size(limit)}: {settings}")
    yield row(f"budgets exceeded in {bench.runs} random runs", exceeded, None, 0, "runs")
    yield row("most of a budget that was held", most, None, 1.0, "of it")


def _within(request: dict[str, Any], limit: int) -> tuple[dict[str, Any], int, int]:
    """What measuring answers in a group of that limit, the group's peak, and how many it killed."""
    with memory_group(limit) as group:
        text = json.dumps(request)
        ran = group.run([sys.executable, "-c", CHILD], input=text, stdout=subprocess.PIPE)
        answer = json.loads(ran.stdout) if ran.returncode == 0 else {"error": f"status {ran.returncode}"}
        return answer, group.peak, group.kills


def _least(error: str) -> int:
    return int(error.split("works is ")[1].split("MiB")[0]) << 20


def _model_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _disk(files: list[Path], seed: int) -> float:
    config = preset("olmoe-1b-7b")
    record = record_bytes("q4", config.hidden_size, config.moe_intermediate_size)
    return random_read_speed(files, record, DISK_SECONDS, seed)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (decode67, decode40, prefill40, bound, resident, qwen30b, contract)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tenfold-gguf")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side(json.loads(arguments.side))
        return
    print_rows({name: PARTS[name] for name in arguments.only}, Bench(arguments), arguments.json)


if __name__ == "__main__":
    main()
