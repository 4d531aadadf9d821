"""Files' tensors made the model's: quantised weights appear as one tensor of floating point each."""

from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from tenfold.checkpoint import read_object
from tenfold.checkpoint.quantization_config import weight_block_size
from tenfold.checkpoint.raw import RawTensor
from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError
from tenfold.quantization import BLOCK, dequantize_fp8_blocks, dequantize_mxfp4

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE, BLOCKS, SCALES = "_scale_inv", "_blocks", "_scales"


def decoded(tensors: dict[str, RawTensor], config_json: Path) -> dict[str, Stored]:
    """One entry a weight: DeepSeek's FP8 and gpt-oss's MXFP4 with their scales, all others as they are.

    FP8 is `X` with `X_scale_inv`, in blocks of the size that `config_json` names; MXFP4 is `X_blocks`
    with `X_scales`, and is called `X`. Raises TenfoldError naming a scale that is missing or misshapen.
    """
    left = dict(tensors)
    mxfp4 = _mxfp4_weights(left)
    for name, stored in mxfp4.items():
        if name in tensors:
            raise TenfoldError(f"{stored.file}: tensor {name} is there twice, also as {name}{BLOCKS}")
    return mxfp4 | _fp8_weights(left, config_json) | {name: _plain(raw) for name, raw in left.items()}


def _fp8_weights(left: dict[str, RawTensor], config_json: Path) -> dict[str, Stored]:
    """Takes FP8 weights and their scales out of `left`."""
    weights = [raw for raw in left.values() if raw.dtype in FLOAT8 and not raw.name.endswith(SCALE)]
    if not weights:
        return {}
    block_size = weight_block_size(read_object(config_json), str(config_json))
    if block_size is None:
        needs = f"which needs quantization_config with quant_method 'fp8' in {config_json.name}"
        raise TenfoldError(f"{weights[0].file}: tensor {weights[0].name} is {_dtype(weights[0])}, {needs}")
    return {
        raw.name: _fp8(left.pop(raw.name), _scale(left, raw, raw.name + SCALE), block_size) for raw in weights
    }


def _mxfp4_weights(left: dict[str, RawTensor]) -> dict[str, Stored]:
    """Takes MXFP4 blocks and their scales out of `left`."""
    stored = {}
    for raw in list(left.values()):
        if raw.dtype == torch.uint8 and raw.name.endswith(BLOCKS):
            name = raw.name.removesuffix(BLOCKS)
            stored[name] = _mxfp4(name, left.pop(raw.name), _scale(left, raw, name + SCALES))
    return stored


def _scale(left: dict[str, RawTensor], weight: RawTensor, name: str) -> RawTensor:
    if name not in left:
        given = _dtype(weight)
        raise TenfoldError(f"{weight.file}: tensor {weight.name} is {given}, and its scale {name} is missing")
    return left.pop(name)


def _plain(raw: RawTensor) -> Stored:
    def read(start: int, stop: int) -> Tensor:
        if raw.dtype not in FLOATS:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise TenfoldError(f"{raw.file}: tensor {raw.name} is {_dtype(raw)}, not {known}")
        return raw.read(start, stop)

    return Stored(raw.name, raw.file, raw.shape, _dtype(raw), raw.num_bytes, read)


def _fp8(raw: RawTensor, raw_scale: RawTensor, block_size: tuple[int, int]) -> Stored:
    if len(raw.shape) != 2:
        raise TenfoldError(f"{raw.file}: tensor {raw.name} is {_dtype(raw)}, but no matrix: {raw.shape}")
    rows, columns = block_size
    _check_shape(raw_scale, (ceil(raw.shape[0] / rows), ceil(raw.shape[1] / columns)), raw)
    scale = _plain(raw_scale)

    def read(start: int, stop: int) -> Tensor:
        first = start // rows
        scales = scale.read(first, ceil(stop / rows))
        whole_blocks = dequantize_fp8_blocks(raw.read(first * rows, stop), scales, block_size)
        return whole_blocks[start - first * rows :]

    num_bytes = raw.num_bytes + raw_scale.num_bytes
    return Stored(raw.name, raw.file, raw.shape, _dtype(raw), num_bytes, read)


def _mxfp4(name: str, blocks: RawTensor, scales: RawTensor) -> Stored:
    if len(blocks.shape) != 4 or blocks.shape[3] * 2 != BLOCK:
        accepted = f"(experts, rows, blocks, {BLOCK // 2})"
        raise TenfoldError(f"{blocks.file}: tensor {blocks.name} has shape {blocks.shape}, not {accepted}")
    _check_shape(scales, blocks.shape[:3], blocks)
    if scales.dtype != torch.uint8:
        raise TenfoldError(f"{scales.file}: tensor {scales.name} is {_dtype(scales)}, not uint8")
    experts, rows, count, _ = blocks.shape

    def read(start: int, stop: int) -> Tensor:
        return dequantize_mxfp4(blocks.read(start, stop), scales.read(start, stop))

    shape = (experts, count * BLOCK, rows)
    return Stored(name, blocks.file, shape, "mxfp4", blocks.num_bytes + scales.num_bytes, read)


def _check_shape(scale: RawTensor, shape: tuple[int, ...], weight: RawTensor) -> None:
    if scale.shape != shape:
        raise TenfoldError(
            f"{scale.file}: tensor {scale.name} has shape {scale.shape},"
            f" not {shape} as {weight.name} of shape {weight.shape} needs"
        )


def _dtype(raw: RawTensor) -> str:
    return str(raw.dtype).removeprefix("torch.")
