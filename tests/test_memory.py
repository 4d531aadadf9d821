"""Memory budgets: refused in words, spent as planned, kept to before the kernel's eyes; the same tokens."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cgroup import memory_group, usable
from random_pack import write_random_pack
from test_cli import run
from texts import TEXTS

from tenfold import compiled, memory
from tenfold.bench import within
from tenfold.checkpoint import save_model
from tenfold.checkpoint.pack.layout import parts_by_file
from tenfold.checkpoint.pack.opened import packed_config
from tenfold.checkpoint.pack.record import record_bytes
from tenfold.config import ModelConfig
from tenfold.engine.budget import Room, plan_memory
from tenfold.engine.generation import generate_tokens, load_generation
from tenfold.engine.loading import load_model_and_tokenizer, load_packed_within, open_batch_runner
from tenfold.engine.runner import new_runner
from tenfold.errors import TenfoldError
from tenfold.formats import Packing
from tenfold.memory import Budget, available_bytes, parse_size, resident_bytes
from tenfold.model.transformer import Transformer
from tenfold.presets import load_preset, preset_names
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer, train_bpe

native = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")
WHY_NO_GROUP = usable()
CONFIG = ModelConfig(
    model_type="qwen3_moe", vocab_size=300, hidden_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=1024,
    max_position_embeddings=512,
)  # fmt: skip
LATENT = ModelConfig(
    **CONFIG.model_dump()
    | {
        "model_type": "deepseek_v2", "num_attention_heads": 64, "num_key_value_heads": 64, "qk_norm": "none",
        "q_lora_rank": 256, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 32,
        "v_head_dim": 128,
    }
)  # fmt: skip
"""Of whose memory attention takes as much as anything else."""
RECORD_BYTES = record_bytes("q4", CONFIG.hidden_size, CONFIG.moe_intermediate_size)
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """115 MB of experts, 3 MB of everything else, and a tokenizer."""
    return write_pack(tmp_path_factory.mktemp("memory") / "packed", CONFIG)


def write_pack(folder: Path, config: ModelConfig) -> Path:
    write_random_pack(folder, config, Packing(experts="q4", rest="q8"))
    tokenizer().save(folder)
    return folder


def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(iter(TEXTS * 5), 300))


def smallest(folder: Path) -> int:
    """The budget that the refusal of one byte names."""
    with pytest.raises(TenfoldError, match="smallest that works is") as refused:
        load_generation(folder, "the cat", GREEDY, Budget(1))
    return parse_size(str(refused.value).split("works is ")[1].split(" ")[0])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8GiB", 8 << 30),
        ("1.5 gib", 3 << 29),
        ("500MB", 500_000_000),
        ("4096", 4096),
        ("2kib", 2048),
        ("7B", 7),
    ],
)
def test_sizes(text: str, wanted: int) -> None:
    assert parse_size(text) == wanted


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert parse_size(text) > 0
    except TenfoldError as error:
        assert "write 8GiB" in str(error)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_control_group_leaves(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's limit counts, too, and cached files do not."""
    process, groups = tmp_path / "proc", tmp_path / "cgroup"
    (process / "self").mkdir(parents=True)
    (process / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 1000 kB\n")
    controller, names = ("", ("memory.max", "memory.current", "file"))
    line = "0::/a/b"
    if version == 1:
        controller, names = "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        line = "4:memory:/a/b\n0::/"
    (process / "self/cgroup").write_text(line + "\n")
    inner = groups / controller / "a/b"
    inner.mkdir(parents=True)
    prefix = "total_" if version == 1 else ""
    for folder, limit in ((inner, str(1 << 62) if version == 1 else "max"), (inner.parent, "500000")):
        (folder / names[0]).write_text(limit)
        (folder / names[1]).write_text("300000")
        (folder / "memory.stat").write_text(f"{prefix}active_file 20000\n{prefix}inactive_file 1000\n")
    monkeypatch.setattr(memory, "_PROC", process)
    monkeypatch.setattr(memory, "_CGROUPS", groups)
    assert available_bytes() == 500000 - 300000 + 21000


@native
@pytest.mark.parametrize("name", [n for n in preset_names() if "switch" not in n and n != "demo"])
def test_every_preset_can_be_planned(name: str) -> None:
    """Without a weight: as much as fits is held, and never more than the budget is spent."""
    config = load_preset(name)
    assert isinstance(config, ModelConfig)
    parts = [part for file in parts_by_file(config, Packing(experts="q4", rest="q8")) for part in file]
    plan = plan_memory(config, parts, 200 << 30, Room(2, 1000))
    spent = plan.process + plan.weights + plan.kv_cache + plan.scratch + plan.slots * plan.record
    assert spent <= plan.budget
    assert plan.slots == plan.experts or spent + plan.record > plan.budget


@native
@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 64), context=st.integers(1, 512), more=st.integers(0, 200 << 20))
def test_plans_add_up(packed: Path, batch: int, context: int, more: int) -> None:
    config, parts = packed_config(packed / "config.json")
    room = Room(batch, context)
    with pytest.raises(TenfoldError) as refused:
        plan_memory(config, parts, 1, room)
    least = parse_size(str(refused.value).split("works is ")[1].split(" ")[0])
    # What this process held at most, before, may be more than it holds now.
    plan = plan_memory(config, parts, max(least, memory.peak_memory_bytes()) + more, room)
    assert 2 <= plan.slots <= plan.experts == 4 * 32
    assert (
        plan.process + plan.weights + plan.kv_cache + plan.scratch + plan.slots * plan.record <= plan.budget
    )


GENERATE = """
import json, sys
from tenfold.engine.generation import load_generation
from tenfold.memory import Budget
from tenfold.sampling import SamplingParams
generation = load_generation(
    sys.argv[1], sys.argv[2], SamplingParams(max_tokens=12, temperature=0), Budget(int(sys.argv[3]))
)
print(json.dumps(generation.finish().summary()))
"""


def least_in_a_fresh_process(folder: Path, prompt: str) -> int:
    command = [sys.executable, "-c", GENERATE, folder, prompt, "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return parse_size(ran.stderr.split("works is ")[1].split(" ")[0])


@native
@pytest.mark.skipif(WHY_NO_GROUP is not None, reason=f"no memory control group: {WHY_NO_GROUP}")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.1])
def test_a_budget_is_kept(packed: Path, share: float) -> None:
    is_kept(packed, share)


@native
@pytest.mark.skipif(WHY_NO_GROUP is not None, reason=f"no memory control group: {WHY_NO_GROUP}")
def test_a_budget_is_kept_with_latent_attention(tmp_path: Path) -> None:
    is_kept(write_pack(tmp_path / "packed", LATENT), 0.0)


def is_kept(packed: Path, share: float) -> None:
    """In a group that the kernel holds to the budget, without swap; and in a wide one, all that is charged to
    it, page cache included, stays below. The tokens are those without a budget."""
    prompt = "the cat sat on the mat " * 40
    budget = least_in_a_fresh_process(packed, prompt) + int(share * 32 * 4 * RECORD_BYTES)
    command = [sys.executable, "-c", GENERATE, str(packed), prompt, str(budget)]
    wanted = load_generation(packed, prompt, GREEDY).finish()
    for limit in (budget, 4 * budget):
        with memory_group(limit) as group:
            ran = group.run(command, capture_output=True)
            assert ran.returncode == 0, ran.stderr
            assert (group.kills, group.peak <= budget) == (0, True)
        found = json.loads(ran.stdout)
        assert found["tokens"] == wanted.tokens
        held = found["usage"]["memory"]
        assert (held["experts_held"] == held["experts"]) == (share > 1)
        assert found["usage"]["peak_memory_bytes"] <= budget


MANY = """
import json, sys
from tenfold.device import one_torch_thread
from tenfold.engine.batch import Chunk
from tenfold.engine.loading import open_batch_runner
from tenfold.memory import Budget, peak_memory_bytes
runner = open_batch_runner(sys.argv[1], Budget(int(sys.argv[2])), 512, 4, 1024).runner
with one_torch_thread():
    for start, stop in ((0, 500), (500, 510), (510, 512)):
        prompts = [Chunk(range(n, n + 8), start, [7 + n] * (stop - start), 1) for n in (0, 8)]
        for chunks in [prompts] if start else [[prompt] for prompt in prompts]:
            runner.begin(chunks).advance()
print(json.dumps([runner.model.plan.summary(), peak_memory_bytes()]))
"""


@native
@pytest.mark.skipif(WHY_NO_GROUP is not None, reason=f"no memory control group: {WHY_NO_GROUP}")
def test_a_budget_is_kept_by_many_sequences(packed: Path) -> None:
    """Which fill a KV cache that they share."""
    command = [sys.executable, "-c", MANY, packed]
    refused = subprocess.run([*command, "1"], capture_output=True, text=True, check=False)
    assert "KV cache" in refused.stderr and "1,024 tokens" in refused.stderr
    budget = parse_size(refused.stderr.split("works is ")[1].split(" ")[0])
    with memory_group(budget) as group:
        ran = group.run([*map(str, command), str(budget)], capture_output=True)
        assert ran.returncode == 0, ran.stderr
        assert (group.kills, group.peak <= budget) == (0, True)
    plan, peak = json.loads(ran.stdout)
    assert (plan["kv_tokens"], plan["context"]) == (1024, 512) and peak <= budget
    assert plan["kv_cache_bytes"] < 1.3 * 1024 * CONFIG.kv_bytes_per_token("bfloat16")


@native
def test_a_kv_cache_takes_its_share_of_what_weights_leave(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But has room for one sequence at least, and for no more than all of them."""
    monkeypatch.setattr("tenfold.engine.budget.peak_memory_bytes", lambda: 0)
    left = 1 << 30
    limit = resident_bytes() + left
    opened = open_batch_runner(packed, Budget(limit), 100_000, 3000)
    assert opened.memory_bytes == limit and opened.runner.max_tokens == 3512
    taken = opened.runner.num_blocks * opened.runner.block_size * CONFIG.kv_bytes_per_token("bfloat16")
    assert 0.2 * left < taken <= 0.25 * left
    for context, sequences, positions in ((64, 2, 128), (512, 1, 512)):
        runner = open_batch_runner(packed, Budget(limit), context, sequences).runner
        assert runner.num_blocks * runner.block_size == positions


@pytest.mark.parametrize("kind", ["plain", pytest.param("packed", marks=native)])
def test_a_cache_less_than_a_sequence_or_more_than_the_memory_is_refused(
    kind: str, packed: Path, tmp_path: Path
) -> None:
    path = packed
    if kind == "plain":
        path = tmp_path
        save_model(Transformer(CONFIG.model_copy(update={"num_hidden_layers": 1})), path, tokenizer())
    with pytest.raises(TenfoldError, match="KV cache of 511 tokens is less than the context of 512"):
        open_batch_runner(path, Budget(), 100_000, 4, 511)
    with pytest.raises(TenfoldError, match=r"a KV cache for .* tokens needs .* GiB"):
        open_batch_runner(path, Budget(), 512, 4, 10**11)
    opened = open_batch_runner(path, Budget(), 512, 4, 600)
    assert opened.runner.num_blocks * opened.runner.block_size == 640


@native
def test_what_does_not_fit_is_streamed_and_the_meter_adds_up(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the default: what is free is made little."""
    wanted = load_generation(packed, "the cat", GREEDY).finish()
    assert wanted.usage.summary()["memory"] is None
    monkeypatch.setattr("tenfold.engine.budget.available_bytes", lambda: 140 << 20)
    monkeypatch.setattr("tenfold.engine.budget.peak_memory_bytes", lambda: 0)
    got = load_generation(packed, "the cat", GREEDY).finish()
    assert got.tokens == wanted.tokens
    usage, plan = got.usage.summary(), got.usage.plan
    assert plan is not None and plan.streams
    for spent in (usage["prompt"], usage["decode"]):
        assert spent["missed_bytes_per_token"] <= spent["weight_bytes_per_token"]
        assert round(spent["disk_bytes_per_token"] * spent["tokens"]) % plan.record == 0
        assert 0 <= spent["hit_rate"] <= 1
        assert 0 <= spent["disk_wait_seconds_per_token"] * spent["tokens"] <= spent["seconds"]
    resident = wanted.usage.summary()["decode"]
    assert usage["decode"]["weight_bytes_per_token"] == resident["weight_bytes_per_token"]
    assert resident["disk_bytes_per_token"] == 0 and resident["hit_rate"] is None


@native
def test_beyond_the_bargain_is_refused(packed: Path) -> None:
    budget = Budget(resident_bytes() * 2)
    model = load_packed_within(packed, budget, Room(2, 40))
    assert model.plan is not None and (model.plan.batch, model.plan.context) == (2, 40)
    new_runner(model, 2, 40)
    for batch, capacity in ((3, 40), (2, 41)):
        with pytest.raises(TenfoldError, match=r"more than the 2 x 40 that the memory budget"):
            new_runner(model, batch, capacity)
    with pytest.raises(TenfoldError, match="40 tokens; the context that the memory budget was planned for"):
        next(generate_tokens(model, [1] * 40, GREEDY))
    assert len(list(generate_tokens(model, [1] * 38, GREEDY))) == 2


@native
def test_a_context_longer_than_the_models_is_cut(packed: Path) -> None:
    model, _ = load_model_and_tokenizer(packed, Budget(resident_bytes() * 2), 100_000)
    assert model.plan is not None and model.plan.context == CONFIG.max_position_embeddings


@native
def test_on_the_command_line(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenfold.engine.budget.peak_memory_bytes", lambda: 0)
    least = smallest(packed)
    options = ("--prompt", "the cat", "--max-tokens", 12, "--temperature", 0, "--memory")
    for size in ("8 parsecs", "0", "-1GiB"):
        assert run(capsys, "generate", packed, *options[:-1], f"--memory={size}")[0] == 2
    status, _, err = run(capsys, "generate", packed, *options, "1MiB")
    assert status == 2 and "smallest that works is" in err and err.count("\n") == 1
    status, out, err = run(capsys, "generate", packed, *options, least + (8 << 20))
    assert status == 0
    assert "KV cache" in err and "1 x 1" in err and "tokens/s" in err and "from disk" in err
    status, out, _ = run(capsys, "generate", packed, *options, least + (8 << 20), "--json")
    assert json.loads(out)["usage"]["memory"]["budget_bytes"] == least + (8 << 20)


def test_a_model_that_is_not_packed_has_no_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(CONFIG.model_copy(update={"num_hidden_layers": 1})).init_weights(0)
    save_model(model, tmp_path / "plain", tokenizer())
    for verb, option, value in (
        ("generate", "--memory", "1GiB"),
        ("bench", "--memory", "1GiB"),
        ("generate", "--warm", "nowhere"),
    ):
        status, _, err = run(capsys, verb, tmp_path / "plain", option, value)
        assert status == 2 and option in err and "only a packed model runs within a budget" in err


@native
def test_bench_over_budgets(packed: Path, tmp_path: Path) -> None:
    """In a process of its own, for this one's size would count."""
    tenfold = (sys.executable, "-c", "from tenfold.cli import main; main()")
    plot = tmp_path / "curve.svg"
    least = least_in_a_fresh_process(packed, "a") + (100 << 20)
    short = ["--prompt-tokens", 4, "--tokens", 2, "--threads", 1, "--plot", plot, "--json"]
    command = [*tenfold, "bench", packed, "--memory", least, "--memory", "2GiB", *short]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    few, all_ = json.loads(ran.stdout)["curve"]
    assert few["memory"]["budget_bytes"] == least
    assert few["memory"]["experts_held"] < all_["memory"]["experts_held"] == 4 * 32
    assert all_["bound_tokens_per_second"] is None and all_["decode"]["disk_bytes_per_token"] == 0
    assert few["peak_memory_bytes"] < least
    assert "<svg" in plot.read_text()
    command = [*tenfold, "bench", packed, "--memory", "1MiB", *short]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "smallest that works is" in ran.stderr and ran.stderr.count("\n") == 1


@native
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_ctrl_c_ends_bench_in_one_line(packed: Path) -> None:
    """A terminal sends it to the process that measures, too."""
    code = "from tenfold.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", packed, "--memory", "2GiB", "--tokens", "400"]
    process = subprocess.Popen(
        list(map(str, [*command, "--prompt-tokens", 8])), text=True, stderr=subprocess.PIPE, process_group=0
    )
    while not (children := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        time.sleep(0.01)
    while "libtorch" not in Path(f"/proc/{children[0]}/maps").read_text():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err.splitlines()[-1]) == (130, "tenfold: interrupted")
    assert "Traceback" not in err


def test_what_the_system_refuses_a_measuring_process_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise OSError(2, "No such file or directory", "model.safetensors")

    monkeypatch.setattr(within, "_measure", gone)
    request = {"model": "m", "settings": {}, "budget": 1, "reserve": 1}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(request)))
    within.child()
    assert "No such file or directory: 'model.safetensors'" in json.loads(capsys.readouterr().out)["error"]


@native
def test_a_process_that_is_killed_says_by_what(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.bench import within
    from tenfold.bench.settings import BenchSettings

    monkeypatch.setattr(within, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(TenfoldError, match=r"within 1\.00 GiB was killed \(Killed\)"):
        within.measure_within(str(packed), BenchSettings(), 1 << 30)


def test_a_curve_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from tenfold.bench.table import report

    cost = {"hit_rate": 0.93, "disk_bytes_per_token": 123.4e6, "tokens_per_second": 21234.5}
    point = {
        "memory": {"budget_bytes": 100 << 30, "experts_held": 4_321, "experts": 15_360},
        "batch": 1, "decode": cost, "prompt": cost,
        "disk_read_bytes_per_second": 2.613e9, "bound_tokens_per_second": 10500.0,
    }  # fmt: skip
    Console(width=80).print(report({"model": "some/model", "curve": [point]}))
    printed = capsys.readouterr().out
    assert "…" not in printed and "15,360 experts" in printed
    row = printed.splitlines()[-2].split()
    assert row == ["100.00", "GiB", "4,321", "93%", "123", "2.61", "21,234", "10,500", "21,234"]


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, err = run(capsys, "bench", "nowhere/", "--memory", "1GiB", "--plot", "/nowhere/p.svg")
    assert status == 2 and "/nowhere/p.svg: cannot be written" in err


def test_a_range_of_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    from tenfold.bench.settings import BenchSettings

    assert BenchSettings(memory=["2GiB..7GiB", "1GiB"]).budgets == [n << 30 for n in range(1, 8)]
    for wrong, why in (
        (("--memory", "3GiB..2GiB"), "smaller size first"),
        (("--memory", "2GiB"), "needs a packed model"),
        (("--plot", "a.svg"), "belongs to --memory"),
    ):
        status, _, err = run(capsys, "bench", *wrong)
        assert status == 2 and why in err
