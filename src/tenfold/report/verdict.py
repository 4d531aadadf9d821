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
    that ends better is read in mid-run, before its learning rate has fully decayed, which is to its
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
        f"Same {sparse['tokens']:,} tokens: sparse needs {sparse[bits]:.4f} bits per byte."
        f" {outcome(sparse[bits] < active[bits])} against the dense twin of equal active parameters"
        f" ({active[bits]:.4f}): {percent(sparse[bits], active[bits], 'fewer', 'more')};"
        f" {to_equal_loss(sparse, active, speedups['dense_active'])}."
        f" {outcome(sparse[bits] < total[bits])} against the twin of equal total parameters"
        f" ({total[bits]:.4f}): {percent(sparse[bits], total[bits], 'fewer', 'more')}, where the twin"
        f" spent {total['train_flops'] / sparse['train_flops']:.1f}x the training FLOPs;"
        f" {to_equal_loss(sparse, total, speedups['dense_total'])}."
    )


def to_equal_loss(sparse: Model, rival: Model, speedups: dict[str, float]) -> str:
    """Who reaches the other's final loss, and with how much."""
    if sparse["val_bits_per_byte"] <= rival["val_bits_per_byte"]:
        who, gains = "it reaches the twin's final loss", speedups
    else:
        who, gains = "the twin reaches its final loss", {k: 1 / v for k, v in speedups.items()}
    tokens, flops = times(gains["tokens"], "fewer", "more"), times(gains["flops"], "fewer", "more")
    return f"{who} with {tokens} tokens and {flops} FLOPs"


def wall_clock(models: dict[str, Model], speedups: dict[str, dict[str, float]]) -> str:
    speed = "train_tokens_per_second"
    sparse, active, total = models["sparse"], models["dense_active"], models["dense_total"]
    seconds = {name: axes["seconds"] for name, axes in speedups.items()}
    return (
        f"To the same loss on the clock: {outcome(seconds['dense_active'] > 1).lower()} against the"
        f" equal-active twin, with {times(seconds['dense_active'], 'less', 'more')} time (it trains at"
        f" {sparse[speed] / active[speed]:.2f}x the twin's tokens per second);"
        f" {outcome(seconds['dense_total'] > 1).lower()} against the equal-total twin, with"
        f" {times(seconds['dense_total'], 'less', 'more')} time"
        f" ({sparse[speed] / total[speed]:.2f}x the tokens per second)."
    )


def generation_cost(models: dict[str, Model]) -> str:
    sparse, active, total = models["sparse"], models["dense_active"], models["dense_total"]
    bytes_, speed = "weight_bytes_per_token", "decode_tokens_per_second"
    saved, gained = total[bytes_] / sparse[bytes_], sparse[speed] / total[speed]
    return (
        f"{outcome(saved > 1)} on bytes: a generated token reads {sparse[bytes_] / 1e6:.2f} MB of weights,"
        f" {times(saved, 'fewer', 'more')} than with the equal-total twin ({total[bytes_] / 1e6:.2f} MB) and"
        f" about as many as with the equal-active one ({active[bytes_] / 1e6:.2f} MB)."
        f" {outcome(gained > 1)} on the clock: at batch 1 it decodes {sparse[speed]:,.0f} tokens per"
        f" second, {gained:.2f}x the equal-total twin and {sparse[speed] / active[speed]:.2f}x the"
        f" equal-active one.{hidden_gain(saved, gained, total[bytes_])}"
    )


CACHE_BYTES = 16e6
"""Weights of less than this stay in the last-level cache of most processors."""


def hidden_gain(saved: float, gained: float, largest_bytes: float) -> str:
    """Why the clock does not show the bytes, where it does not."""
    if gained > 0.8 * saved:
        return ""
    if largest_bytes > CACHE_BYTES:
        return " The clock shows less than the bytes."
    return (
        " The clock shows less than the bytes: at this size every model's weights fit in the processor's"
        " cache, and the time goes to starting many small operations, of which a sparse layer has more."
    )


def outcome(won: bool) -> str:
    return "Sparse won" if won else "Sparse lost"


def percent(ours: float, theirs: float, less: str, more: str) -> str:
    change = ours / theirs - 1
    return f"{abs(change):.1%} {less if change < 0 else more}"


def times(speedup: float, less: str, more: str) -> str:
    return f"{speedup:.2f}x {less}" if speedup >= 1 else f"{1 / speedup:.2f}x {more}"
