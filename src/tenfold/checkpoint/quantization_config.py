"""The quantization_config of a config.json: how its weights are stored. No torch here."""

from typing import Any

from tenfold.errors import TenfoldError
from tenfold.formats import packing_of


def weight_block_size(raw: dict[str, Any], source: str) -> tuple[int, int] | None:
    """Rows and columns that share an FP8 scale, or None where the weights are not FP8.

    Raises TenfoldError for a method other than DeepSeek's `fp8` in blocks, gpt-oss's `mxfp4` and our own.
    """
    given = raw.get("quantization_config")
    if given is None or packing_of(raw, source):
        return None
    if not isinstance(given, dict) or given.get("quant_method") not in ("fp8", "mxfp4"):
        method = given.get("quant_method") if isinstance(given, dict) else given
        raise TenfoldError(
            f"{source}: quantization_config quant_method {method!r} is not supported,"
            " only 'fp8', 'mxfp4' or 'tenfold'"
        )
    if given["quant_method"] == "mxfp4":
        return None
    sizes = given.get("weight_block_size")
    if not isinstance(sizes, list) or [type(size) for size in sizes] != [int, int] or min(sizes) < 1:
        raise TenfoldError(
            f"{source}: quantization_config weight_block_size {sizes!r} is not supported,"
            " only two whole numbers of at least 1: rows and columns"
        )
    return sizes[0], sizes[1]
