"""FP8 and MXFP4 weights: every code against transformers and against exact arithmetic; whole checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tenfold.checkpoint import load_config, load_model, save_model
from tenfold.checkpoint.weights import list_tensors
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer
from tenfold.quantization import dequantize_fp8_blocks, dequantize_mxfp4

few = settings(max_examples=40, deadline=None, derandomize=True)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Signs of zeros count; one NaN is as good as another."""
    width = {2: torch.int16, 4: torch.int32}[left.element_size()]
    equal = left.contiguous().view(width) == right.contiguous().view(width)
    return left.dtype == right.dtype and bool((equal | (left.isnan() & right.isnan())).all())


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fp8_value(code: int) -> float:
    """E4M3 without infinities (OCP 8-bit Floating Point 1.0, table 1)."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (math.ldexp(8 + fraction, exponent - 10) if exponent else math.ldexp(fraction, -9))


def fp8_loop(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Exact products in float64, rounded once."""
    out = torch.empty(codes.shape, dtype=torch.float64)
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            out[r, c] = fp8_value(int(codes[r, c])) * float(scales[r // block[0], c // block[1]])
    return out.float()


EXTREME = [1.0, 2**-126, 1e-38, 3.3e38, 2**-149, 0.0, 1.1754942e-38, 1 / 3, 7e-5]


@pytest.mark.parametrize("scale", EXTREME)
def test_every_fp8_code_at_extreme_scales(scale: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    weight, scales = codes.view(torch.float8_e4m3fn), torch.tensor([[scale, 1.0], [-scale, scale / 3]])
    ours = dequantize_fp8_blocks(weight, scales, (8, 8))
    assert same_bits(ours, fp8_loop(codes, scales, (8, 8)))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    assert same_bits(ours.bfloat16(), theirs)


@few
@given(
    rows=st.integers(0, 20),
    columns=st.integers(0, 20),
    block=st.tuples(st.integers(1, 24), st.sampled_from([1, 2, 5, 8, 10**30])),
    seed=st.integers(0, 9),
)
def test_ragged_fp8_blocks(rows: int, columns: int, block: tuple[int, int], seed: int) -> None:
    codes = random_bytes(rows, columns, seed=seed)
    scales = torch.randn(-(-rows // block[0]), -(-columns // block[1]))
    ours = dequantize_fp8_blocks(codes.view(torch.float8_e4m3fn), scales, block)
    assert same_bits(ours, fp8_loop(codes, scales, block))


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def mxfp4_loop(blocks: Tensor, scales: Tensor) -> Tensor:
    """(experts, columns, rows), exact in float64."""
    experts, rows, count, _ = blocks.shape
    out = torch.empty(experts, count * 32, rows, dtype=torch.float64)
    for e, r, b, i in torch.cartesian_prod(*(torch.arange(n) for n in (experts, rows, count, 32))).tolist():
        code = int(blocks[e, r, b, i // 2]) >> 4 * (i % 2) & 15
        sign = -1.0 if code & 8 else 1.0
        out[e, b * 32 + i, r] = sign * math.ldexp(FP4[code & 7], int(scales[e, r, b]) - 127)
    return out.float()


def test_every_mxfp4_byte_at_every_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16)
    ours = dequantize_mxfp4(blocks, scales)
    assert ours.shape == (1, 512, 256)
    for dtype in (torch.bfloat16, torch.float32):
        assert same_bits(ours.to(dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype))
    few_rows = [0, 1, 22, 126, 127, 128, 252, 253, 254, 255]
    loop = mxfp4_loop(blocks[:, few_rows], scales[:, few_rows])
    assert same_bits(ours[..., few_rows], loop)


@few
@given(experts=st.integers(0, 3), rows=st.integers(0, 5), count=st.integers(0, 2), seed=st.integers(0, 9))
def test_mxfp4_of_any_shape(experts: int, rows: int, count: int, seed: int) -> None:
    blocks = random_bytes(experts, rows, count, 16, seed=seed)
    scales = random_bytes(experts, rows, count, seed=seed + 1)
    assert same_bits(dequantize_mxfp4(blocks, scales), mxfp4_loop(blocks, scales))


SHARED = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
DEEPSEEK = ModelConfig(
    **SHARED, model_type="deepseek_v3", hidden_size=24, intermediate_size=20, num_experts=3,
    num_experts_per_tok=2, moe_intermediate_size=9, n_shared_experts=1, router="sigmoid", qk_norm="none",
    mlp_only_layers=(0,), head_dim=4, kv_lora_rank=7, q_lora_rank=11, qk_nope_head_dim=6,
    qk_rope_head_dim=4, v_head_dim=5, rope_interleave=True,
)  # fmt: skip
GPT_OSS = ModelConfig(
    **SHARED, model_type="gpt_oss", hidden_size=64, num_experts=3, num_experts_per_tok=2, head_dim=8,
    moe_intermediate_size=32, intermediate_size=0, router="topk_softmax", qk_norm="none", moe_bias=True,
    attention_bias=True, attention_out_bias=True, attention_sinks=True, hidden_act="clamped_swiglu",
    sliding_window=3, layer_types=("sliding_attention", "full_attention"),
)  # fmt: skip


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def quantised(config: ModelConfig, directory: Path, quantization: dict[str, Any]) -> tuple[dict, Path]:
    """A saved model's tensors, and its directory with that quantization_config."""
    save_model(Transformer(config).init_weights(0), directory)
    change(directory / "config.json", quantization_config=quantization)
    return load_file(directory / "model.safetensors"), directory / "model.safetensors"


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A DeepSeek-V3 as published: projections in FP8, of blocks cut short at the edges; the rest in bf16."""
    tensors, path = quantised(
        DEEPSEEK, tmp_path / "fp8", {"quant_method": "fp8", "weight_block_size": [5, 7], "fmt": "e4m3"}
    )
    for name in list(tensors):
        if name.endswith("proj.weight"):
            rows, columns = tensors[name].shape
            tensors[name] = (tensors[name] * 30).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 5), -(-columns // 7)) + 0.01
    save_file(tensors, path)
    return tmp_path / "fp8"


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    """A gpt-oss as published: experts in MXFP4."""
    tensors, path = quantised(GPT_OSS, tmp_path / "mxfp4", {"quant_method": "mxfp4"})
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = random_bytes(experts, rows, columns // 32, 16)
            tensors[f"{name}_scales"] = 118 + random_bytes(experts, rows, columns // 32) % 4
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return tmp_path / "mxfp4"


def test_an_fp8_checkpoint_loads_as_its_dequantised_twin(fp8: Path, tmp_path: Path) -> None:
    path = fp8 / "model.safetensors"
    stored, plain = load_file(path), {}
    for name, tensor in stored.items():
        if f"{name}_scale_inv" in stored:
            plain[name] = fp8_loop(tensor.view(torch.uint8), stored[f"{name}_scale_inv"], (5, 7))
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    assert len(stored) > len(plain) + 10
    models = [load_model(fp8, dtype) for dtype in (torch.float32, torch.bfloat16)]
    change(fp8 / "config.json", quantization_config=None)
    save_file(plain, path)
    for model in models:
        wanted = load_model(fp8, model.embed_tokens.weight.dtype).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, wanted[name]), name


def test_a_dequantised_model_is_saved_without_quantization(fp8: Path, tmp_path: Path) -> None:
    save_model(load_model(fp8), tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert load_config(tmp_path / "again") == load_config(fp8)


def test_an_mxfp4_checkpoint_is_transformers_own(mxfp4: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        mxfp4, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    model = load_model(mxfp4, torch.bfloat16)
    save_model(model, tmp_path / "ours")
    wanted = theirs.state_dict()
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, wanted[name]), name
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.allclose(model.float()(ids), theirs.float()(ids).logits, atol=1e-4)


@pytest.mark.parametrize("pieces", [1, 2, 7, 24])
def test_rows_of_quantised_weights(fp8: Path, mxfp4: Path, pieces: int) -> None:
    """Pieces that begin and end inside blocks are parts of the whole."""
    for stored in [*list_tensors(fp8).values(), *list_tensors(mxfp4).values()]:
        parts = [
            stored.read(at, min(at + pieces, stored.shape[0])) for at in range(0, stored.shape[0], pieces)
        ]
        assert torch.equal(torch.cat(parts), stored.whole()), stored.name
        assert stored.whole().shape == stored.shape


FP8_NAME = "model.layers.1.self_attn.o_proj.weight"
MXFP4_NAME = "model.layers.0.mlp.experts.down_proj"
BAD = {
    "fp8 scale missing": (
        "fp8",
        lambda t: t.pop(f"{FP8_NAME}_scale_inv"),
        f"tensor {FP8_NAME} is float8_e4m3fn, and its scale {FP8_NAME}_scale_inv is missing",
    ),
    "fp8 scale misshapen": (
        "fp8",
        lambda t: t.update({f"{FP8_NAME}_scale_inv": torch.ones(2, 2)}),
        rf"tensor {FP8_NAME}_scale_inv has shape \(2, 2\), not \(5, 2\) as {FP8_NAME} of shape \(24, 10\)",
    ),
    "fp8 scale of integers": (
        "fp8",
        lambda t: t.update({f"{FP8_NAME}_scale_inv": torch.ones(5, 2, dtype=torch.int32)}),
        f"tensor {FP8_NAME}_scale_inv is int32, not float32",
    ),
    "fp8 scale in fp8": (
        "fp8",
        lambda t: t.update({f"{FP8_NAME}_scale_inv": t[FP8_NAME][:5, :2].contiguous()}),
        f"tensor {FP8_NAME}_scale_inv is float8_e4m3fn, not float32",
    ),
    "fp8 scale alone": (
        "fp8",
        lambda t: t.update({FP8_NAME: t[FP8_NAME].float()}),
        f"tensor {FP8_NAME}_scale_inv has no place",
    ),
    "fp8 vector": (
        "fp8",
        lambda t: t.update({FP8_NAME: t[FP8_NAME].view(-1)}),
        rf"tensor {FP8_NAME} is float8_e4m3fn, but no matrix: \(240,\)",
    ),
    "mxfp4 scale missing": (
        "mxfp4",
        lambda t: t.pop(f"{MXFP4_NAME}_scales"),
        f"tensor {MXFP4_NAME}_blocks is uint8, and its scale {MXFP4_NAME}_scales is missing",
    ),
    "mxfp4 scale misshapen": (
        "mxfp4",
        lambda t: t.update({f"{MXFP4_NAME}_scales": torch.ones(3, 64, 2, dtype=torch.uint8)}),
        rf"tensor {MXFP4_NAME}_scales has shape \(3, 64, 2\), not \(3, 64, 1\)",
    ),
    "mxfp4 scale of floats": (
        "mxfp4",
        lambda t: t.update({f"{MXFP4_NAME}_scales": torch.ones(3, 64, 1)}),
        f"tensor {MXFP4_NAME}_scales is float32, not uint8",
    ),
    "mxfp4 blocks misshapen": (
        "mxfp4",
        lambda t: t.update({f"{MXFP4_NAME}_blocks": torch.ones(3, 64, 16, dtype=torch.uint8)}),
        rf"tensor {MXFP4_NAME}_blocks has shape \(3, 64, 16\), not \(experts, rows, blocks, 16\)",
    ),
    "mxfp4 twice": (
        "mxfp4",
        lambda t: t.update({MXFP4_NAME: torch.ones(3, 32, 64)}),
        f"tensor {MXFP4_NAME} is there twice, also as {MXFP4_NAME}_blocks",
    ),
}


@pytest.mark.parametrize(("kind", "harm", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoints(request: pytest.FixtureRequest, kind: str, harm: Any, message: str) -> None:
    directory = request.getfixturevalue(kind)
    tensors = load_file(directory / "model.safetensors")
    harm(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(TenfoldError, match=f"model.safetensors: {message}"):
        load_model(directory)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is not supported, only 'fp8', 'mxfp4' or 'tenfold'"),
        ({"bits": 4}, "quant_method None is not supported"),
        ("fp8", "quant_method 'fp8' is not supported, only"),
        ({"quant_method": "fp8"}, "weight_block_size None is not supported, only two whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\] is not"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, r"weight_block_size \[0, 1\] is not"),
        ({"quant_method": "fp8", "weight_block_size": [True, 1]}, r"weight_block_size \[True, 1\] is not"),
    ],
)
def test_quantization_that_is_not_known(fp8: Path, quantization: Any, message: str) -> None:
    change(fp8 / "config.json", quantization_config=quantization)
    with pytest.raises(TenfoldError, match=f"config.json: quantization_config {message}"):
        load_config(fp8)


def test_fp8_weights_of_an_unquantised_config(fp8: Path) -> None:
    change(fp8 / "config.json", quantization_config=None)
    with pytest.raises(TenfoldError, match=r"proj.weight is float8_e4m3fn, which needs quantization_config"):
        load_model(fp8)
