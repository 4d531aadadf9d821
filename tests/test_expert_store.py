"""Experts streamed through few slots: the same numbers as resident, whatever happens to disk and process."""

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_families import random_fields
from test_packed_engine import SHAPE, build, stepwise
from torch import Tensor

from tenfold import compiled
from tenfold.checkpoint import save_model
from tenfold.checkpoint.pack.packing import pack
from tenfold.checkpoint.pack.record import record_bytes
from tenfold.checkpoint.raw import RawTensor
from tenfold.checkpoint.weights import list_raw
from tenfold.engine.packed import PackedRunner
from tenfold.errors import TenfoldError
from tenfold.formats import ExpertsFormat, Packing
from tenfold.packed import StreamedExperts, load_packed, read_packed

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")

MODEL = SHAPE | {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 3, "vocab_size": 53}
LATENT = {"num_experts": 8, "num_experts_per_tok": 3, "mlp_only_layers": ()}
EXPERTS = 24
RECORD = record_bytes("q4", 48, 24)


def write_pack(folder: Path, fields: dict[str, object], experts: ExpertsFormat = "q4") -> Path:
    save_model(build(fields), folder / "model")
    pack(folder / "model", folder / "packed", Packing(experts=experts, rest="q8"))
    return folder / "packed"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack that no test changes."""
    return write_pack(tmp_path_factory.mktemp("kept"), MODEL)


@pytest.fixture
def own(kept: Path, tmp_path: Path) -> Path:
    """A pack to do harm to."""
    return Path(shutil.copytree(kept, tmp_path / "own"))


def text(batch: int = 1, length: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(batch + length)
    return torch.randint(0, 53, (batch, length), generator=generator)


def logits(path: Path, slots: int | None, ids_BS: Tensor, prompt: int) -> Tensor:
    """Of a resident model where there are no slots."""
    model = load_packed(path) if slots is None else read_packed(path, slots)
    return stepwise(PackedRunner(model, *ids_BS.shape), ids_BS, prompt)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe", "deepseek_v2", "granitemoe"])
def test_families_say_to_the_bit_what_they_say_resident(family: str, tmp_path: Path) -> None:
    formats: dict[str, ExpertsFormat] = {"gpt_oss": "mxfp4", "olmoe": "bf16", "granitemoe": "q8"}
    path = write_pack(tmp_path, random_fields(family, 0), formats.get(family, "q4"))
    ids_BS = text(2, 30)
    wanted = logits(path, None, ids_BS, 21)
    for slots in (2, 4, 1000):
        assert logits(path, slots, ids_BS, 21).equal(wanted)


@settings(deadline=None, max_examples=12)
@given(st.integers(2, EXPERTS + 1), st.integers(1, 4), st.integers(1, 20), st.integers(1, 3))
def test_any_memory_batch_and_prompt(kept: Path, slots: int, batch: int, prompt: int, threads: int) -> None:
    ids_BS = text(batch, 25)
    before = compiled.module().threads()
    compiled.module().set_threads(threads)
    try:
        assert logits(kept, slots, ids_BS, prompt).equal(logits(kept, None, ids_BS, prompt))
    finally:
        compiled.module().set_threads(before)


def test_records_of_several_pieces(tmp_path: Path) -> None:
    """Longer than the MiB that readers take at once, and no multiple of it."""
    fields = MODEL | {
        "num_hidden_layers": 1,
        "num_experts": 4,
        "hidden_size": 512,
        "moe_intermediate_size": 1000,
    }
    path = write_pack(tmp_path, fields, "q8")
    assert record_bytes("q8", 512, 1000) % (1 << 20) and record_bytes("q8", 512, 1000) > 1 << 20
    assert logits(path, 2, text(), 20).equal(logits(path, None, text(), 20))


def test_all_in_memory_reads_everything_once(kept: Path) -> None:
    model = read_packed(kept, 10**9)
    assert model.store and model.store.slots == EXPERTS and model.store.record_bytes == RECORD
    runner = PackedRunner(model, 4, 200)
    runner.forward(text(4, 100))
    first = model.store.meter()
    assert first.hits == 0 and first.misses * RECORD == first.bytes_read > 0
    for _ in range(30):
        runner.forward(text(4, 1))
    last = model.store.meter()
    assert last.hits > 0 and last.bytes_read == RECORD * last.misses <= EXPERTS * RECORD


def test_a_call_reads_each_missing_expert_once(kept: Path) -> None:
    """A prompt through two slots: one read an expert and layer, however many tokens want it."""
    model = read_packed(kept, 2)
    PackedRunner(model, 1, 200).forward(text(1, 200))
    assert model.store
    meter = model.store.meter()
    assert meter.misses * RECORD == meter.bytes_read
    assert meter.hits + meter.misses <= EXPERTS  # the last layer has one token


def test_what_is_used_most_stays(kept: Path) -> None:
    """With a slot too few for everything, the same token again and again soon finds all it wants."""
    model = read_packed(kept, 12)
    runner = PackedRunner(model, 1, 64)
    runner.forward(text(1, 10))
    for _ in range(20):
        runner.forward(torch.tensor([[7]]))
    assert model.store
    before = model.store.meter()
    for _ in range(20):
        runner.forward(torch.tensor([[7]]))
    after = model.store.meter()
    assert after.hits - before.hits > 0.8 * 20 * 9


@pytest.mark.parametrize("attention", ["grouped", "latent"])
def test_look_ahead_reads_ahead_and_changes_nothing(attention: str, kept: Path, tmp_path: Path) -> None:
    ids_BS = text(1, 90)
    path = kept if attention == "grouped" else write_pack(tmp_path, random_fields("deepseek_v2", 0) | LATENT)
    model = read_packed(path, 6)
    got = stepwise(PackedRunner(model, 1, 90), ids_BS, 3)
    assert got.equal(logits(path, None, ids_BS, 3))
    assert model.store
    meter = model.store.meter()
    assert 0 < meter.prefetched_used <= meter.prefetched
    assert meter.bytes_read <= (meter.misses + meter.prefetched) * model.store.record_bytes


def test_nothing_is_looked_for_where_all_have_room(kept: Path) -> None:
    model = read_packed(kept, EXPERTS)
    stepwise(PackedRunner(model, 1, 90), text(1, 90), 3)
    assert model.store
    assert model.store.meter().prefetched == 0


def test_warm_experts_are_no_misses(kept: Path) -> None:
    model = read_packed(kept, EXPERTS)
    assert model.store
    model.store.warm((layer, expert) for layer in (2, 0, 1) for expert in range(8))
    before = model.store.meter()
    assert before.bytes_read == EXPERTS * RECORD
    PackedRunner(model, 1, 40).forward(text())
    after = model.store.meter()
    assert (after.misses, after.bytes_read) == (before.misses, before.bytes_read) and after.hits > 0


def test_warming_stops_at_the_slots_and_refuses_what_is_not_there(kept: Path) -> None:
    model = read_packed(kept, 3)
    assert model.store
    model.store.warm([(0, expert) for expert in range(8)])
    assert model.store.meter().bytes_read == 3 * RECORD
    for pair in ((3, 0), (-1, 0), (0, 8), (0, -1)):
        with pytest.raises(TenfoldError, match=f"layer {pair[0]} has no expert {pair[1]}"):
            model.store.warm([pair])


@pytest.mark.parametrize("slots", [-1, 0, 1])
def test_too_few_slots_are_refused(kept: Path, slots: int) -> None:
    with pytest.raises(TenfoldError, match=f"{slots} experts in memory are too few: at least 2"):
        read_packed(kept, slots)


def test_a_dense_model_is_read_and_has_no_store(tmp_path: Path) -> None:
    dense = MODEL | {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    path = write_pack(tmp_path, dense)
    assert read_packed(path, 2).store is None
    assert logits(path, 2, text(), 5).equal(logits(path, None, text(), 5))


@settings(max_examples=200)
@given(st.binary(max_size=3000), st.integers(0, 40))
def test_checksums_are_zlibs(data: bytes, skipped: int) -> None:
    held = torch.frombuffer(bytearray(bytes(skipped) + data + b"."), dtype=torch.uint8)
    for isa in compiled.module().isas():
        with patch.dict(os.environ, TENFOLD_ISA=isa):
            assert compiled.module().crc32(held.data_ptr() + skipped, len(data)) == zlib.crc32(data)


@pytest.mark.parametrize("parts", [0.5, 1, 2, 3.7])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_checksums_of_many_parts_are_zlibs(parts: float, more: int) -> None:
    data = os.urandom(int(parts * (256 << 10)) + more)
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    assert compiled.module().crc32(held.data_ptr(), len(data)) == zlib.crc32(data)


def stored(path: Path, name: str) -> RawTensor:
    return list_raw(path)[name]


def record(path: Path, layer: int, expert: int) -> tuple[Path, int]:
    """The file and the first byte of an expert's record."""
    raw = stored(path, f"layers.{layer}.mlp.experts.{expert}")
    return raw.file, raw.offset


def damage(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 4]))


def test_a_record_damaged_while_running_is_never_computed_with(own: Path) -> None:
    """It is named, the others still serve, and so does it when it is whole again."""
    wanted, runner = logits(own, None, text(), 20), PackedRunner(read_packed(own, 3), 1, 40)
    assert runner.forward(text()[:, :20]).equal(wanted[:, 0])
    middles = [at + RECORD // 2 for _, at in (record(own, 1, expert) for expert in range(8))]
    file, _ = record(own, 1, 0)
    for at in middles:
        damage(file, at)
    runner.reset()
    with pytest.raises(
        TenfoldError, match=rf"{file.name}: layer 1, expert \d is damaged: .* CRC-32 \w{{8}}, not"
    ):
        runner.forward(text()[:, :20])
    for at in middles:
        damage(file, at)
    runner.reset()
    assert stepwise(runner, text(), 20).equal(wanted)


def test_what_was_read_of_a_file_before_it_was_whole_is_read_again(own: Path) -> None:
    """All of a layer is read at once, and the first of it that is damaged ends the call."""
    wanted, runner = logits(own, None, text(), 20), PackedRunner(read_packed(own, 12), 1, 40)
    middles = [(file, at + RECORD // 2) for file, at in (record(own, 1, expert) for expert in range(8))]
    for file, at in middles:
        damage(file, at)
    with pytest.raises(TenfoldError, match=r"layer 1, expert \d is damaged"):
        runner.forward(text()[:, :20])
    for file, at in middles:
        damage(file, at)
    runner.reset()
    assert stepwise(runner, text(), 20).equal(wanted)


def test_a_file_truncated_while_running_is_an_error(own: Path) -> None:
    runner = PackedRunner(read_packed(own, 2), 1, 40)
    file, at = record(own, 1, 4)
    os.truncate(file, at + 100)
    with pytest.raises(TenfoldError, match=rf"{file.name}: cannot read .* ends at .*\(layer 1, expert \d\)"):
        runner.forward(text())


def test_a_file_replaced_while_running_is_read_as_it_was(own: Path) -> None:
    wanted, runner = logits(own, None, text(), 20), PackedRunner(read_packed(own, 2), 1, 40)
    for file in own.glob("*.safetensors"):
        file.with_suffix(".new").write_bytes(b"another model")
        file.with_suffix(".new").replace(file)
    assert stepwise(runner, text(), 20).equal(wanted)


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.1.self_attn.q_proj.weight", "norm.weight"])
def test_damage_to_all_the_rest_is_found_on_loading(own: Path, name: str) -> None:
    raw = stored(own, name)
    damage(raw.file, raw.offset + 5)
    with pytest.raises(TenfoldError, match=f"{raw.file.name}: tensor {name} is damaged"):
        read_packed(own, 2)


@pytest.mark.parametrize("name", ["layers.0.mlp.experts.0", "lm_head.weight"])
def test_a_pack_without_checksums_is_refused(own: Path, name: str) -> None:
    raw = stored(own, name)
    written = raw.note.rpartition(" ")[2].encode()
    raw.file.write_bytes(raw.file.read_bytes().replace(written, b"nochecks", 1))
    with pytest.raises(TenfoldError, match=f"tensor {name} has nochecks for a CRC-32"):
        read_packed(own, 2)


def cached(file: Path) -> int:
    """Pages of a file in the page cache."""
    size = file.stat().st_size
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as pages:
        states = (ctypes.c_ubyte * -(-size // 4096))()
        address = ctypes.addressof(first := ctypes.c_char.from_buffer(pages))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states) == 0
        del first
    return sum(state & 1 for state in states)


def left_in_cache(path: Path) -> int:
    """Pages that a run leaves there beyond headers and parts of pages; -1 where all files are kept."""
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(map(cached, files)):
        return -1
    stepwise(PackedRunner(read_packed(path, 4), 1, 40), text(), 20)
    left = sum(map(cached, files))
    headers = sum(-(-(8 + int.from_bytes(file.read_bytes()[:8], "little")) // 4096) for file in files)
    return max(0, left - headers - 2 * len(files))


def test_nothing_stays_in_the_page_cache(own: Path) -> None:
    if (left := left_in_cache(own)) < 0:
        pytest.skip("this file system keeps its files in memory")
    assert left == 0


def test_two_threads_take_turns_at_one_store(kept: Path) -> None:
    model, wanted = read_packed(kept, 3), logits(kept, None, text(), 20)
    results: dict[int, Tensor] = {}

    def run(number: int) -> None:
        results[number] = stepwise(PackedRunner(model, 1, 40), text(), 20)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and all(result.equal(wanted) for result in results.values())


PROGRAM = """
import os, shutil, signal, sys, time
from pathlib import Path
import torch
from test_expert_store import PackedRunner, TenfoldError, left_in_cache, logits, read_packed, stepwise, text

path, slots = Path(sys.argv[1]), int(sys.argv[2])
wanted = logits(path, None, text(), 20)
model = read_packed(path, slots)
runner = PackedRunner(model, 1, 40)
def same():
    runner.reset()
    return stepwise(runner, text(), 20).equal(wanted)
def fault(kind):
    Path(os.environ["FAULT"]).write_text(kind)
"""


def start(path: Path, slots: int, program: str, *more: str, **environment: str) -> subprocess.Popen[str]:
    """Python that has PROGRAM behind it."""
    command = [sys.executable, "-c", PROGRAM + program, str(path), str(slots), *more]
    return subprocess.Popen(
        command, cwd=Path(__file__).parent, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def test_two_processes_on_one_pack(kept: Path) -> None:
    processes = [start(kept, slots, "assert all(same() for _ in range(5))") for slots in (2, 5)]
    for process in processes:
        finish(process)


FORKS = """
import threading
assert same()
stop = False
def work():
    other = PackedRunner(model, 1, 40)
    while not stop:
        other.reset()
        stepwise(other, text(), 20)
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    if (child := os.fork()) == 0:
        first = model.store.meter().bytes_read
        os._exit(0 if first == 0 and same() and model.store.meter().bytes_read else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same()
stop = True
thread.join()
if os.fork() == 0:
    sys.exit()
sys.exit(os.waitpid(-1, 0)[1])
"""


def test_a_fork_has_a_store_of_its_own(kept: Path) -> None:
    finish(start(kept, 4, FORKS))


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    yield library


def faulty(shim: Path, tmp_path: Path, path: Path, slots: int, program: str) -> subprocess.Popen[str]:
    unused = str(tmp_path / "copy")
    return start(path, slots, program, unused, LD_PRELOAD=str(shim), FAULT=str(tmp_path / "fault"))


ODD = """
fault("not direct")
assert left_in_cache(Path(shutil.copytree(path, sys.argv[3]))) <= 0
for kind in ("not direct", "short", "interrupted", "slow 3"):
    fault(kind)
    assert same(), kind
    model = read_packed(path, slots)
    runner = PackedRunner(model, 1, 40)
    assert same(), kind
fault("error")
try:
    same()
except TenfoldError as error:
    print(error)
fault("")
assert same()
"""


def test_disks_that_are_odd_serve_and_errors_are_told_and_forgotten(
    shim: Path, tmp_path: Path, kept: Path
) -> None:
    said = finish(faulty(shim, tmp_path, kept, 4, ODD))
    assert ".safetensors: cannot read it: Input/output error (layer 0, expert" in said


def test_a_call_through_two_slots_ends_on_the_slowest_disk(shim: Path, tmp_path: Path, kept: Path) -> None:
    """Each read is longer than a call waits before it lets Python hear of signals and begins again."""
    program = """
wanted = logits(path, None, text(1, 1), 1)
fault("slow 300")
assert runner.forward(text(1, 1)).equal(wanted[:, 0])
meter = model.store.meter()
assert meter.hits + meter.misses == 3 * 3, meter  # what begins again is counted once
"""
    finish(faulty(shim, tmp_path, kept, 2, program))


def test_an_expert_that_look_ahead_brings_late_is_one_miss(shim: Path, tmp_path: Path, kept: Path) -> None:
    program = """
fault("slow 5")
stepwise(runner, text(), 1)
fault("")
model.store.warm([(0, 0)])
meter = model.store.meter()
assert meter.prefetched_late
read = meter.misses + meter.prefetched_in_time
assert read * model.store.record_bytes <= meter.bytes_read, meter
"""
    finish(faulty(shim, tmp_path, kept, 6, program))


INTERRUPTED = """
fault('slow 2500')
print('reading', flush=True)
try:
    same()
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
fault('')
assert same()
"""


def test_ctrl_c_while_the_disk_is_waited_for(shim: Path, tmp_path: Path, kept: Path) -> None:
    process = faulty(shim, tmp_path, kept, 3, INTERRUPTED)
    assert process.stdout and process.stdout.readline() == "reading\n"
    time.sleep(0.3)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    if not (heard := process.stdout.readline()):
        finish(process)  # says how it ended
    assert float(heard) - sent < 1.5
    finish(process)


def test_streamed_experts_are_weights_of_known_size(kept: Path) -> None:
    weight = read_packed(kept, 2).weights["layers.2.mlp.experts"]
    assert isinstance(weight, StreamedExperts) and weight.nbytes == 8 * RECORD
