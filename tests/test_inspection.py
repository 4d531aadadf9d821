"""`tenfold inspect`: numbers for machines under stable names, tables for people, at once."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_quantization
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf_files import write_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import run

from tenfold.checkpoint import save_model
from tenfold.config import ModelConfig
from tenfold.counting import BITS_PER_WEIGHT
from tenfold.inspection import _scaled, inspect
from tenfold.model.transformer import Transformer
from tenfold.presets import preset_names

fp8, mxfp4 = test_quantization.fp8, test_quantization.mxfp4

STABLE = {
    "architecture", "total_params", "active_params", "active_params_without_input_embedding",
    "active_fraction", "embedding_params", "lm_head_params", "attention_params", "norm_params",
    "dense_mlp_params", "shared_expert_params", "router_params", "expert_params", "bias_params", "mtp_params",
    "experts", "experts_per_token", "context", "flops_per_token", "weights_per_token",
    "weights_per_token_fraction", "weight_bytes", "weight_bytes_per_token", "kv_bytes_per_token", "kernels",
}  # fmt: skip
PARTS = [
    "embedding",
    "lm_head",
    "attention",
    "norm",
    "dense_mlp",
    "shared_expert",
    "router",
    "expert",
    "bias",
]


def test_json_has_the_stable_names(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "inspect", "mixtral-8x7b", "--context", 100, "--json")
    found = json.loads(out)
    assert status == 0
    assert found.keys() == STABLE
    assert found["total_params"] == 46_702_792_704
    assert found["weights_per_token"] == 12_748_853_248 + 4096  # one row of the embedding
    assert found["kv_bytes_per_token"]["bfloat16"] == 32 * 2 * 8 * 128 * 2
    assert found["context"] == 100


@pytest.mark.parametrize("name", preset_names())
def test_parts_add_up(name: str) -> None:
    found = inspect(name, 4096)
    assert sum(found[f"{part}_params"] for part in PARTS) == found["total_params"]
    assert found["weight_bytes"]["bfloat16"] == 2 * found["total_params"]
    assert found["weight_bytes_per_token"]["bfloat16"] == 2 * found["weights_per_token"]


def test_bits_of_mxfp4_are_ggmls() -> None:
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType.MXFP4]
    assert BITS_PER_WEIGHT["mxfp4"] == 8 * size / weights


@pytest.mark.parametrize("name", preset_names())
def test_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, out, _ = run(capsys, "inspect", name)
    assert status == 0
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    assert f"{inspect(name, 4096)['total_params']:,}" in out


def test_tables_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "inspect", "mixtral-8x7b")
    rows = {line.strip().partition("  ")[0]: line.split()[-3:] for line in out.splitlines() if line.strip()}
    assert rows["total"] == ["46.7", "B", "46,702,792,704"]
    assert rows["active, without it"] == ["12.75", "B", "12,748,853,248"]
    assert rows["weights it touches"][-2:] == ["27.3%", "12,748,857,344"]
    assert "86.99 GiB" in out and "128 KiB" in out
    assert "shared experts" not in out and "biases" not in out


@given(st.integers(0, 10**15))
def test_units_keep_four_digits(number: int) -> None:
    text, _, unit = _scaled(number, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]).partition(" ")
    size = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert float(text.replace(",", "")) * size == pytest.approx(number, rel=5e-4)


def test_what_a_directory_stores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    save_model(Transformer(config), tmp_path / "m", dtype=torch.bfloat16, max_shard_bytes=3000)
    found = inspect(str(tmp_path / "m"), 4096)
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert found["stored"] == {
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "tensor_bytes": {"bfloat16": 2 * config.num_params()},
    }
    _, out, _ = run(capsys, "inspect", tmp_path / "m")
    assert f"{len(files)} files" in out and "tensors in bfloat16" in out

    for file in files:
        file.unlink()
    assert inspect(str(tmp_path / "m"), 4096).keys() == STABLE


@pytest.mark.parametrize(("kind", "form"), [("fp8", "float8_e4m3fn"), ("mxfp4", "mxfp4")])
def test_quantised_tensors_count_with_their_scales(
    request: pytest.FixtureRequest, kind: str, form: str
) -> None:
    directory = request.getfixturevalue(kind)
    sizes: dict[str, int] = dict.fromkeys((form, "float32"), 0)
    for name, tensor in load_file(directory / "model.safetensors").items():
        small = tensor.dtype.itemsize == 1 or name.endswith("_scale_inv")
        sizes[form if small else "float32"] += tensor.nbytes
    assert inspect(str(directory), 4096)["stored"]["tensor_bytes"] == sizes


def test_what_a_gguf_file_stores(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "model[1].gguf"  # no markup
    config = ModelConfig(
        model_type="llama", qk_norm="none", vocab_size=50, hidden_size=32, num_hidden_layers=1,
        intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    write_model(file, Transformer(config), GGMLQuantizationType.Q8_0)
    stored = {}
    for tensor in GGUFReader(file).tensors:
        kind = tensor.tensor_type.name
        stored[kind] = stored.get(kind, 0) + tensor.n_bytes
    assert len(stored) == 2
    status, out, _ = run(capsys, "inspect", file, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["total_params"] == config.num_params()
    assert found["stored"] == {"files": 1, "file_bytes": file.stat().st_size, "tensor_bytes": stored}
    _, out, _ = run(capsys, "inspect", file)
    assert "model[1].gguf" in out.replace("\n", "") and "tensors in Q8_0" in out


def test_the_largest_answers_at_once_and_without_torch() -> None:
    code = (
        "import sys; from tenfold.cli import main; sys.argv = ['tenfold', 'inspect', 'switch-c-2048'];"
        "main(); assert 'torch' not in sys.modules"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert time.monotonic() - start < 2
    assert done.returncode == 0, done.stderr
    assert "1,571,308,972,448" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mixtral-8x7", "did you mean mixtral-8x7b"),
        ("no/such/directory", "no/such/directory: no such file or directory"),
        ("some/model", "HF_HUB_OFFLINE"),
    ],
)
def test_what_is_not_there(capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    status, _, err = run(capsys, "inspect", name)
    assert status == 2 and words in err and err.count("\n") == 1
