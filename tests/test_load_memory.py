"""Loading takes hardly more memory than the model it makes: measured from outside, in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenfold.checkpoint import save_model
from tenfold.config import ModelConfig
from tenfold.model.transformer import Transformer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CONFIG = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=49152,
    hidden_size=512,
    num_hidden_layers=2,
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=640,
)
CODE_BYTES = 6_000_000
"""Of libraries, touched for the first time by a load."""

MEASURE = """
import sys, torch
from tenfold.checkpoint import load_model

def memory(field):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[field].split()[0]) * 1024

before = memory("VmRSS")
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(sum(p.nbytes for p in model.parameters()), memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("memory") / "bf16"
    model = Transformer(CONFIG)
    save_model(model, directory, dtype=torch.bfloat16, max_shard_bytes=50_000_000)
    return directory


@pytest.fixture(scope="module")
def fp8(bf16: Path) -> Path:
    """The same model, its projections in FP8."""
    directory = bf16.parent / "fp8"
    directory.mkdir()
    config: dict[str, Any] = json.loads((bf16 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {}
    for shard in bf16.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name.endswith("proj.weight"):
                tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in tensor.shape])
                tensor = tensor.to(torch.float8_e4m3fn)
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("stored", "dtype"), [("bf16", "float32"), ("bf16", "bfloat16"), ("fp8", "bfloat16")]
)
def test_peak_is_the_model_and_a_tenth(request: pytest.FixtureRequest, stored: str, dtype: str) -> None:
    directory = request.getfixturevalue(stored)
    command = [sys.executable, "-c", MEASURE, str(directory), dtype]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    model_bytes, growth = map(int, ran.stdout.split())
    assert model_bytes > 1.4e8
    assert model_bytes < growth < 1.1 * model_bytes + CODE_BYTES, f"{growth / model_bytes:.3f}"
