"""Who won, on each axis, in one plain sentence; also where sparse lost."""

from itertools import pairwise
from typing import Any

Model = dict[str, Any]


def judge(models: dict[str, Model]) -> dict[str, Any]:
    """`speedup_to_equal_loss` against each twin, and `verdicts` for the three axes."""
    sparse = models["sparse"]
    speedups = {
        rival: {axis: speedup(sparse, models[rival], axis) for axis in ("tokens", "flops", "seconds")}
        for rival in ("dense_active", "dense_total")
    }
    return {
        "speedup_to_equal_loss": speedups,
        "verdicts": {
            "quality": quality(models, speedups),
            "time": wall_clock(models, speedups),
            "cost": generation_cost(models),
        },
    }


def speedup(sparse: Model, rival: Model, axis: str) -> float:
    """How many times less the sparse model spent to reach the worse of the two final losses.

    Below 1 it spent more. Curves are read between validation points by straight lines. The one
    that ends better is read in mid-run, before its learning rate has decayed, which is to its
    disadvantage.
    """
    bits = max(sparse["val_bits_per_byte"], rival["val_bits_per_byte"])
    return reached(rival["curve"], bits, axis) / reached(sparse["curve"], bits, axis)


def reached(curve: list[dict[str, float]], bits: float, axis: str) -> float:
    """Where on `axis` a curve first comes down to `bits`; its last point if only that does."""
    for before, after in pairwise(curve):
        if before["bits_per_byte"] <= bits:
            return before[axis]
        if after["bits_per_byte"] <= bits:
            fall = before["bits_per_byte"] - after["bits_per_byte"]
            share = (before["bits_per_byte"] - bits) / fall
            return before[axis] + share * (after[axis] - before[axis])
    return curve[-1][axis]


def quality(models: dict[str, Model], speedups: dict[str, dict[str, float]]) -> str:
    sparse, active, total = models["sparse"], models["dense_active"], models["dense_total"]
    bits = "val_bits_per_byte"
    return (
        f"Same {sparse['tokens']:,} tokens: sparse needs {sparse[bits]:.4f} bits per byte,"
        f" {percent(sparse[bits], active[bits], 'fewer', 'more')} than the dense twin of equal active"
        f" parameters ({active[bits]:.4f}), whose final loss it reaches with"
        f" {times(speedups['dense_active']['flops'], 'fewer', 'more')} FLOPs;"
        f" {percent(sparse[bits], total[bits], 'fewer', 'more')} than the twin of equal total"
        f" parameters ({total[bits]:.4f}), which spent"
        f" {total['train_flops'] / sparse['train_flops']:.1f}x the training FLOPs."
    )


def wall_clock(models: dict[str, Model], speedups: dict[str, dict[str, float]]) -> str:
    speed = "train_tokens_per_second"
    sparse, active, total = models["sparse"], models["dense_active"], models["dense_total"]
    return (
        f"On the clock: {won_or_lost(speedups['dense_active']['seconds'])} against the equal-active"
        f" twin, in {times(speedups['dense_active']['seconds'], 'less', 'more')} time to the same loss"
        f" (it trains at {sparse[speed] / active[speed]:.2f}x the twin's tokens per second);"
        f" {won_or_lost(speedups['dense_total']['seconds'])} against the equal-total twin, in"
        f" {times(speedups['dense_total']['seconds'], 'less', 'more')} time"
        f" ({sparse[speed] / total[speed]:.2f}x the tokens per second)."
    )


def generation_cost(models: dict[str, Model]) -> str:
    sparse, active, total = models["sparse"], models["dense_active"], models["dense_total"]
    bytes_, speed = "weight_bytes_per_token", "decode_tokens_per_second"
    saved, gained = total[bytes_] / sparse[bytes_], sparse[speed] / total[speed]
    return (
        f"A generated token reads {sparse[bytes_] / 1e6:.2f} MB of weights,"
        f" {saved:.1f}x fewer than the equal-total twin ({total[bytes_] / 1e6:.2f} MB) and as many as"
        f" the equal-active one ({active[bytes_] / 1e6:.2f} MB); measured at batch 1, it decodes at"
        f" {sparse[speed]:,.0f} tokens per second, {gained:.2f}x the equal-total twin and"
        f" {sparse[speed] / active[speed]:.2f}x the equal-active one." + hidden_gain(saved, gained)
    )


def hidden_gain(saved: float, gained: float) -> str:
    """Why the clock does not show the bytes, where it does not."""
    if gained > 0.8 * saved:
        return ""
    return (
        " The clock shows less than the bytes: at this size the weights fit in the processor's"
        " cache, and the time goes to starting many small operations, of which a sparse layer has more."
    )


def percent(ours: float, theirs: float, less: str, more: str) -> str:
    change = ours / theirs - 1
    return f"{abs(change):.1%} {less if change < 0 else more}"


def times(speedup: float, less: str, more: str) -> str:
    return f"{speedup:.2f}x {less}" if speedup >= 1 else f"{1 / speedup:.2f}x {more}"


def won_or_lost(speedup: float) -> str:
    return "sparse won" if speedup > 1 else "sparse lost"
