"""How a GGUF file says that RoPE is stretched: as keys, and for Llama 3 as a tensor of divisors."""

import math

from tenfold.checkpoint.gguf.fields import Fields
from tenfold.errors import TenfoldError

FACTORS = "rope_freqs.weight"
LLAMA3_CONTEXT = 8192
"""What llama.cpp's converter takes for the old context when it computes the divisors."""


def rope_scaling(fields: Fields, dim: int) -> dict[str, object] | None:
    """The fields of a RopeScaling, or None; `dim` is the number of dimensions that RoPE turns."""
    factor = fields.real("rope.scaling.factor", fields.real("rope.scale_linear", 0.0))  # the older name
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        fields.fail("rope.scaling.type", "none, linear or yarn")
    if FACTORS in fields.tensors:
        return _llama3(fields, dim)
    if kind == "none" or factor in (0, 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return _yarn(fields, factor)


def _yarn(fields: Fields, factor: float) -> dict[str, object]:
    fields.only("rope.scaling.yarn_ext_factor", 1.0)
    values: dict[str, object] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.whole("rope.scaling.original_context_length"),
        "beta_fast": fields.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.real("rope.scaling.yarn_beta_slow", 1.0),
    }
    if fields.get("rope.scaling.yarn_attn_factor") is not None:
        values["attention_factor"] = fields.real("rope.scaling.yarn_attn_factor")
    return values


def _llama3(fields: Fields, dim: int) -> dict[str, object] | None:
    """The settings from which the divisors were computed.

    The share of its old speed that a frequency keeps goes from 1 / factor, for those that turn
    low_freq_factor times in the old context, to 1 at high_freq_factor, in a straight line.
    """
    stored = fields.tensors[FACTORS]
    if stored.shape != (dim // 2,):
        raise TenfoldError(f"{stored.file}: tensor {FACTORS} has shape {stored.shape}, not ({dim // 2},)")
    divisors: list[float] = stored.whole().tolist()
    if set(divisors) == {1.0}:
        return None
    theta = fields.real("rope.freq_base", 10000.0)
    try:
        turns = [LLAMA3_CONTEXT * theta ** (-2 * n / dim) / math.tau for n in range(dim // 2)]
        shares = [1 / divisor for divisor in divisors]
        low, high = _line(turns, shares)
        ramps = [min(max((turn - low) / (high - low), 0), 1) for turn in turns]
        wanted = [min(shares) * (1 - ramp) + ramp for ramp in ramps]
        agree = all(abs(share / want - 1) < 1e-3 for share, want in zip(shares, wanted, strict=True))
    except ArithmeticError:
        agree = False
    if not agree:
        raise TenfoldError(f"{stored.file}: tensor {FACTORS} does not hold the divisors of Llama 3's RoPE")
    return {
        "rope_type": "llama3",
        "factor": round(max(divisors), 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


def _line(turns: list[float], shares: list[float]) -> tuple[float, float]:
    """low_freq_factor and high_freq_factor; Llama 3's own where fewer than two points lie between."""
    least = min(shares)
    between = [(t, share) for t, share in zip(turns, shares, strict=True) if 1.001 * least < share < 0.999]
    if len(between) < 2:
        return 1.0, 4.0
    (turn, share), (last_turn, last_share) = between[0], between[-1]
    slope = (share - last_share) / (turn - last_turn)
    high = turn + (1 - share) / slope
    return round(high - (1 - least) / slope, 5), round(high, 5)
