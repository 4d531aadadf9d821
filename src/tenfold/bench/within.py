"""One model within one memory budget, measured in a process of its own: what ran before would count."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tenfold.bench.settings import BenchSettings
from tenfold.errors import TenfoldError
from tenfold.memory import Budget, peak_memory_bytes, resident_bytes, size

ROUNDS = 2
"""After one that is not counted, which fills the store."""
DISK_SECONDS = 0.5
"""Of reading at random after each round: a disk has good and bad moments, and these are the run's own."""
CHILD = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for its parent, which then kills it
from tenfold.bench.within import child
child()
"""


def measure_within(model: str, settings: BenchSettings, budget: int) -> dict[str, Any]:
    """A point of the curve, with stable names; `bound_tokens_per_second` is decoding if the disk were all.

    Raises TenfoldError for a budget that is too small, and where the process is killed.
    """
    request = {
        "model": model,
        "settings": settings.model_dump(mode="json"),
        "budget": budget,
        "reserve": resident_bytes(),
    }
    ran = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ran.returncode < 0:
        why = signal.strsignal(-ran.returncode)
        raise TenfoldError(f"measuring within {size(budget)} was killed ({why})")
    if ran.returncode:
        raise TenfoldError(f"measuring within {size(budget)} ended with exit status {ran.returncode}")
    answer: dict[str, Any] = json.loads(ran.stdout)
    if "error" in answer:
        raise TenfoldError(answer["error"])
    return answer


def child() -> None:
    """The other side: a request on stdin, a point on stdout."""
    request = json.loads(sys.stdin.read())
    settings = BenchSettings.model_validate(request["settings"])
    try:
        answer = _measure(request["model"], settings, request["budget"], request["reserve"])
    except (TenfoldError, OSError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def _measure(model: str, settings: BenchSettings, budget: int, reserve: int) -> dict[str, Any]:
    from tenfold.bench import disk
    from tenfold.bench.speed import metered_round, random_ids
    from tenfold.bench.subject import load_within
    from tenfold.bench.threads import use_threads
    from tenfold.device import one_torch_thread
    from tenfold.engine.runner import new_runner
    from tenfold.engine.usage import Usage
    from tenfold.hub import resolve

    threads = use_threads(settings.threads)
    packed = load_within(model, settings, Budget(budget, settings.warm, reserve + disk.BUFFERS_BYTES))
    assert packed.plan is not None
    positions = settings.prompt_tokens + settings.tokens
    runner = new_runner(packed, settings.batch, positions)
    files = sorted(Path(resolve(model)).glob("*.safetensors"))
    usage, speeds = Usage(packed, settings.batch), []
    with one_torch_thread():
        for number in range(ROUNDS + 1):
            ids_BS = random_ids(packed.config.vocab_size, settings.batch, positions, number)
            if not number:
                metered_round(runner, ids_BS, settings.prompt_tokens, Usage(packed, settings.batch))
                continue
            metered_round(runner, ids_BS, settings.prompt_tokens, usage)
            speeds.append(disk.random_read_speed(files, packed.plan.record, DISK_SECONDS, number))
    speed = sum(speeds) / len(speeds)
    decode = usage.costs(usage.decode)
    missed = decode["missed_bytes_per_token"]
    return {
        "threads": threads,
        "batch": settings.batch,
        "memory": packed.plan.summary(),
        "prompt": usage.costs(usage.prompt),
        "decode": decode,
        "disk_read_bytes_per_second": speed,
        "bound_tokens_per_second": speed / missed if missed else None,
        "peak_memory_bytes": peak_memory_bytes(),
    }
