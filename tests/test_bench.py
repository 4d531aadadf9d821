"""`tenfold bench`: what it counts is exact, what it refuses is named, what it times has its names."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run

from tenfold import compiled
from tenfold.bench.model import prefill_ops
from tenfold.bench.settings import BenchSettings
from tenfold.bench.subject import cut, formats
from tenfold.checkpoint import save_model
from tenfold.checkpoint.pack.record import down_offset
from tenfold.config import ModelConfig
from tenfold.engine.random_weights import RandomRows, random_packed, random_packed_bytes
from tenfold.engine.reading import Reading, expected_experts
from tenfold.engine.runner import TorchRunner
from tenfold.errors import TenfoldError
from tenfold.formats import Packing
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedExperts, PackedMatrix
from tenfold.panels import matrix_bytes, pack_matrix, panel_bytes, unpack_matrix
from tenfold.presets import preset_names

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=300,
    hidden_size=40,
    num_hidden_layers=3,
    mlp_only_layers=(1,),
    intermediate_size=50,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
)
CEILINGS = {
    "threads",
    "isa",
    "read_bandwidth_bytes_per_second",
    "int8_ops_per_second",
    "bf16_flops_per_second",
    "fp32_flops_per_second",
    "disk_read_bytes_per_second",
}
MODEL = {
    "backend",
    "formats",
    "load_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "weight_bytes_per_token",
    "peak_memory_bytes",
    "decode_fraction_of_bandwidth",
    "prefill_fraction_of_int8_peak",
    "prefill_fraction_of_bf16_peak",
    "prefill_fraction_of_fp32_peak",
    "python_overhead_fraction",
}
QUICK = ("--prompt-tokens", 8, "--tokens", 2, "--threads", 1)
native = pytest.mark.skipif(not compiled.available(), reason="no native kernels here")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceilings' own buffers, files and products are of no interest here."""
    monkeypatch.setattr("tenfold.bench.ceilings.READ_BYTES", 1 << 22)
    monkeypatch.setattr("tenfold.bench.ceilings.DISK_BYTES", 1 << 23)
    monkeypatch.setattr("tenfold.bench.ceilings.PRODUCT", 64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "model"
    save_model(Transformer(CONFIG).init_weights(0), directory)
    return directory


def test_ceilings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "bench", "--threads", 1, "--json")
    found = json.loads(out)
    assert status == 0 and found.keys() == CEILINGS and found["threads"] == 1
    assert found["read_bandwidth_bytes_per_second"] > 1e8
    assert found["fp32_flops_per_second"] > 1e7
    status, out, _ = run(capsys, "bench", "--threads", 1)
    assert status == 0 and "memory read" in out


@native
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_peaks_rank_as_the_arithmetic_does(isa: str) -> None:
    """Bytes go faster than floats wherever there are vectors; what is not there is 0."""
    module = compiled.module()
    if isa not in module.isas():
        pytest.skip(f"no {isa} here")
    int8, bf16, fp32 = (module.peak(kind, isa, 1) for kind in ("int8", "bf16", "fp32"))
    assert fp32 > 1e8 and int8 > 1e8
    assert (int8 > fp32 and bf16 > fp32) if isa == "avx512" else bf16 == 0
    assert module.peak("int4", isa, 1) == 0


def test_a_float_model_is_measured_with_torch(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "bench", saved, *QUICK, "--batch", 2, "--json")
    found = json.loads(out)
    assert status == 0 and found.keys() >= CEILINGS | MODEL
    assert found["backend"] == "torch" and found["python_overhead_fraction"] is None
    assert found["formats"] == {"experts": "float32", "rest": "float32"}
    read = found["decode_tokens_per_second"] * found["weight_bytes_per_token"]
    assert found["decode_fraction_of_bandwidth"] == pytest.approx(
        read / found["read_bandwidth_bytes_per_second"]
    )
    status, out, _ = run(capsys, "bench", saved, *QUICK)
    assert status == 0 and "torch kernels" in out
    assert "% of memory read" in out and "% of fp32" in out


@native
def test_a_packed_model_is_measured_with_the_kernels(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert run(capsys, "pack", saved, "-o", packed, "--experts", "q8", "--rest", "bf16")[0] == 0
    status, out, err = run(capsys, "bench", packed, *QUICK, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["backend"] == "native" and found["formats"] == {"experts": "q8", "rest": "bf16"}
    assert 0 < found["python_overhead_fraction"] < 1


@native
def test_a_shape_needs_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--shape", "demo", "--layers", 2, "--experts", "mxfp4", "--rest", "q4")
    status, out, err = run(capsys, "bench", *options, *QUICK, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["num_hidden_layers"] == 2 and found["formats"] == {"experts": "mxfp4", "rest": "q4"}


def test_without_native_kernels_a_shape_runs_in_float32(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_native", None)
    status, out, _ = run(capsys, "bench", "--shape", "demo", "--layers", 1, *QUICK, "--json")
    found = json.loads(out)
    assert status == 0 and (found["backend"], found["isa"]) == ("torch", None)
    status, _, err = run(capsys, "bench", "--shape", "demo", "--experts", "q4")
    assert status == 2 and "--experts" in err and err.count("\n") == 1


BAD = [
    (("--shape", "olmo-1b"), "olmoe-1b-7b"),
    (("--shape", "switch-base-8"), "encoder-decoder"),
    (("--shape", "demo", "--layers", 5), "--layers 5"),
    (("--shape", "demo", "--layers", 0), "layers"),
    (("--shape", "demo", "--experts", "q5"), "q5"),
    (("--shape", "demo", "--batch", 0), "batch"),
    (("--shape", "demo", "--threads", 0), "threads"),
    (("--threads", 4096), "cores that this process may use"),
    (("--shape", "demo", "--prompt-tokens", 10**6), "max_position_embeddings"),
    (("--shape", "deepseek-v3"), "GiB of memory"),
    (("--shape", "demo", "--batch", 4096), "GiB of memory"),
    (("--experts", "q8"), "--shape"),
    (("nowhere", "--shape", "demo"), "not both"),
    (("nowhere/",), "nowhere"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(map(str, value))[:40])
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    words: str,
) -> None:
    monkeypatch.setattr("tenfold.memory.available_bytes", lambda: 2 << 30)
    status, _, err = run(capsys, "bench", *arguments)
    assert status == 2 and words in err
    assert err.startswith("tenfold: ") and err.count("\n") == 1


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), form=st.sampled_from(["bf16", "q8", "q4"]))
@settings(max_examples=20, deadline=None)
def test_random_panels_are_those_of_the_random_matrix(rows: int, columns: int, form: str) -> None:
    source = RandomRows()
    matrix = source.matrix("some.name", rows, columns)
    assert torch.equal(source.panels("some.name", rows, columns, form), pack_matrix(matrix, form))


def test_random_rows_wrap_around() -> None:
    source = RandomRows()
    matrix = source.matrix("a", 2100, 8)
    assert torch.equal(matrix[:52], matrix[2048:])
    assert torch.equal(source.panels("a", 2100, 8, "q8"), pack_matrix(matrix, "q8"))
    assert not torch.equal(matrix, source.matrix("b", 2100, 8))
    assert matrix.std().item() == pytest.approx(0.02, rel=0.05)


def test_random_experts_are_records_of_gate_up_and_down() -> None:
    model = random_packed(CONFIG, Packing(experts="q8", rest="bf16"))
    layer = model.weights["layers.0.mlp.experts"]
    assert isinstance(layer, PackedExperts)
    D, F = layer.hidden_size, layer.width
    record, source, name = layer.records[3], RandomRows(), "layers.0.mlp.experts.3"
    pairs = record[: down_offset("q8", D, F)].view(-1, 2, panel_bytes("q8", D))
    for half, side in enumerate(("gate", "up")):
        weights = unpack_matrix(pairs[:, half].flatten(), "q8", F, D)
        assert torch.allclose(weights, source.matrix(f"{name}.{side}", F, D), atol=1e-3)
    down = record[down_offset("q8", D, F) :][: matrix_bytes("q8", D, F)]
    assert torch.allclose(unpack_matrix(down, "q8", D, F), source.matrix(f"{name}.down", D, F), atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_counted_once(tied: bool, batch: int) -> None:
    """Against the parts of the model, written out."""
    config = CONFIG.model_copy(update={"tie_word_embeddings": tied})
    packing = Packing(experts="q4", rest="q8")
    model = random_packed(config, packing)
    sizes = {}
    for name, weight in model.weights.items():
        tensor = weight.panels if isinstance(weight, PackedMatrix) else weight
        sizes[name] = tensor.records.nbytes if isinstance(tensor, PackedExperts) else tensor.nbytes
    assert sum(sizes.values()) == random_packed_bytes(config, packing)
    experts = sum(size for name, size in sizes.items() if name.endswith(".mlp.experts"))
    embedding = 0 if tied else sizes["embed_tokens.weight"]
    others = sum(sizes.values()) - experts - embedding
    touched = expected_experts(6, 2, batch)
    expected = others + experts * touched / 6 + embedding * batch / 300
    assert Reading.of(config, model.weights, batch).bytes_per_step == pytest.approx(expected, abs=1)


def test_a_tied_embedding_is_not_the_rest() -> None:
    """It stays at q8, whatever the other matrices are in."""
    model = random_packed(CONFIG.model_copy(update={"tie_word_embeddings": True}), Packing(rest="q4"))
    embedding = model.weights["embed_tokens.weight"]
    assert isinstance(embedding, PackedMatrix) and embedding.format == "q8"
    assert formats(model.weights) == {"experts": "q4", "rest": "q4"}


def test_expected_experts_are_those_of_random_choices() -> None:
    assert expected_experts(64, 8, 1) == 8
    assert expected_experts(0, 0, 5) == 0
    chosen = torch.rand(2000, 8, 64).topk(8).indices.flatten(1)
    mean = sum(len(row.unique()) for row in chosen) / len(chosen)
    assert expected_experts(64, 8, 8) == pytest.approx(mean, rel=0.01)


def test_prefill_counts_the_head_once_a_sequence() -> None:
    config = CONFIG.model_copy(update={"num_hidden_layers": 1, "mlp_only_layers": ()})
    matrices = config.params().attention + config.params().router + 2 * config.expert_params
    for prompt, batch in ((1, 1), (7, 3)):
        wanted = BenchSettings(prompt_tokens=prompt, batch=batch)
        assert prefill_ops(config, wanted) == 2 * batch * (prompt * matrices + 300 * 40)


@pytest.mark.parametrize("preset", [name for name in preset_names() if not name.startswith("switch")])
def test_cut_shapes_are_whole_configs(preset: str) -> None:
    from tenfold.presets import load_preset

    config = load_preset(preset)
    assert isinstance(config, ModelConfig)
    shorter = cut(config, 3)
    assert ModelConfig(**shorter.model_dump()) == shorter and shorter.num_hidden_layers == 3
    with pytest.raises(TenfoldError, match="more than"):
        cut(config, config.num_hidden_layers + 1)


@torch.inference_mode()
def test_the_torch_runner_is_the_model() -> None:
    model = Transformer(CONFIG).init_weights(0).eval()
    ids_BS = torch.randint(300, (2, 9))
    runner = TorchRunner(model, 2, 9)
    for _ in range(2):
        runner.reset()
        runner.forward(ids_BS[:, :8])
        assert torch.allclose(runner.forward(ids_BS[:, 8:]), model(ids_BS)[:, -1], atol=1e-5)
