"""Experts as two grouped matrix products over tokens sorted by expert. Dropless, differentiable."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.kernels import ACTIVATIONS, EMPTY_SLOT, compute_dtype

ROW_BYTES = 16
"""torch's grouped_mm wants rows that are a multiple of this many bytes."""

SHORTEST_RUN = 128
RUNS_PER_OCTAVE = 8
"""oneDNN compiles a bf16 product anew for every number of rows it has not met, and expert loads are
new at every step. Runs are padded to few lengths: multiples of 128, then an eighth of a power of two."""


def experts(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    activation: str = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Each token's chosen experts, weighted and summed. Returns (T, D) in the compute dtype."""
    dtype = compute_dtype(x_TD)
    x_TD, gate_up, down = x_TD.to(dtype), gate_up.to(dtype), down.to(dtype)
    up = Projection(gate_up, None if gate_up_bias is None else gate_up_bias.to(dtype))
    out = Projection(down, None if down_bias is None else down_bias.to(dtype))
    act = ACTIVATIONS[activation]
    if len(x_TD) == 1 and not torch.is_grad_enabled():
        return _one_token(x_TD, up, out, expert_ids_TK, expert_weights_TK, act)
    rows = _sort_by_expert(expert_ids_TK, len(gate_up), pad=_recompiles(x_TD, len(gate_up)))
    weight = expert_weights_TK.flatten().index_select(0, rows.slot) * rows.filled
    weight = weight.to(dtype)[:, None]
    hidden = act(up(_Dispatch.apply(x_TD, rows), rows))  # type: ignore[no-untyped-call]
    # Weighted before `down`, where rows are narrower: the combination is then a plain sum.
    y = out(hidden * weight, rows, scale=weight)
    out_TD: Tensor = _Combine.apply(y, rows)  # type: ignore[no-untyped-call]
    return out_TD


class _Rows(NamedTuple):
    """Slots in order of expert, each expert's run padded with unfilled rows. Empty slots get no row."""

    slot: Tensor
    """Of each row."""
    token: Tensor
    """Of each row."""
    expert: Tensor
    """Of each row."""
    filled: Tensor
    """1, or 0 for padding."""
    ends_E: Tensor
    """Where each expert's run ends."""
    padded: bool
    """Whether every run is whole pieces of SHORTEST_RUN."""
    place: Tensor
    """The filled rows in order of slot, so that a token's are together."""
    starts_T: Tensor
    """Where each token's begin in `place`."""

    def gather(self, x_TD: Tensor) -> Tensor:
        return x_TD.index_select(0, self.token)

    def add_up(self, y: Tensor) -> Tensor:
        """Each token's rows: ten times as fast on the CPU as index_add, and in a fixed order (LOG.md)."""
        return F.embedding_bag(self.place, y, self.starts_T, mode="sum")


class _Dispatch(torch.autograd.Function):
    """Tokens to rows; backward adds up."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return rows.gather(x_TD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.add_up(grad.contiguous()), None


class _Combine(torch.autograd.Function):
    """Rows added up to tokens; backward gathers."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        return rows.add_up(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.gather(grad), None


class Projection(NamedTuple):
    """One matrix, and maybe a bias, of every expert."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, rows: _Rows, scale: Tensor | float = 1.0) -> Tensor:
        """Every row of x by its expert's matrix; `scale` is of the bias."""
        y = _grouped_linear(x, self.weight, rows)
        return y if self.bias is None else y + self.bias[rows.expert] * scale

    def of_one(self, expert: int, x: Tensor) -> Tensor:
        y = x @ self.weight[expert].T
        return y if self.bias is None else y + self.bias[expert]


def _recompiles(x_TD: Tensor, num_experts: int) -> bool:
    """Whether odd run lengths cost more than padding them, as with many tokens in bf16 on the CPU."""
    on_onednn = x_TD.device.type == "cpu" and x_TD.dtype == torch.bfloat16
    return on_onednn and len(x_TD) >= SHORTEST_RUN * num_experts


def _sort_by_expert(expert_ids_TK: Tensor, num_experts: int, pad: bool) -> _Rows:
    """Which rows there are, each expert's run padded to few lengths if `pad`."""
    ids = expert_ids_TK.flatten()
    load = (ids + 1).bincount(minlength=num_experts + 1)
    order = ids.argsort(stable=True)[int(load[0]) :]
    load_E = load[1:]
    run_E = _padded(load_E) if pad else load_E
    ends_E = run_E.cumsum(0)
    shift_E = (ends_E - run_E) - (load_E.cumsum(0) - load_E)
    row = torch.arange(len(order), device=ids.device) + shift_E[ids[order]]
    slot = order.new_zeros(int(ends_E[-1])).index_copy(0, row, order)
    filled = torch.zeros(len(slot), device=ids.device).index_fill(0, row, 1.0)
    place = torch.full_like(ids, EMPTY_SLOT).index_copy(0, order, row)
    used_T = (expert_ids_TK != EMPTY_SLOT).sum(-1)
    return _Rows(
        slot=slot,
        token=slot // expert_ids_TK.shape[1],
        expert=ids[slot],
        filled=filled,
        ends_E=ends_E,
        padded=pad,
        place=place[place != EMPTY_SLOT],
        starts_T=used_T.cumsum(0) - used_T,
    )


def _padded(load_E: Tensor) -> Tensor:
    """Each load rounded up to the next length that runs may have; 0 stays 0."""
    octave_E = load_E.clamp(min=1).log2().floor().exp2()
    step_E = (octave_E / RUNS_PER_OCTAVE).clamp(min=SHORTEST_RUN).long()
    return (load_E + step_E - 1) // step_E * step_E


def _grouped_linear(x: Tensor, weight: Tensor, rows: _Rows) -> Tensor:
    """x[run of e] @ weight[e].T for every expert e: (n, i), (E, o, i) -> (n, o).

    torch's grouped_mm is as fast as one matmul an expert on the CPU and faster on CUDA (LOG.md),
    but takes only rows of a multiple of 16 bytes, and no float64.
    """
    widths = (weight.shape[1] * weight.itemsize, weight.shape[2] * weight.itemsize)
    if len(x) and x.dtype != torch.float64 and all(width % ROW_BYTES == 0 for width in widths):
        if rows.padded:
            out: Tensor = _PaddedLinear.apply(x, weight, rows.ends_E)  # type: ignore[no-untyped-call]
            return out
        return F.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends_E.int())
    runs = x.tensor_split(rows.ends_E[:-1].cpu())
    return torch.cat([run @ matrix.T for run, matrix in zip(runs, weight, strict=True)])


class _PaddedLinear(torch.autograd.Function):
    """grouped_mm whose weight gradient is made of equal pieces of runs, all at once.

    A product of few rows and columns over a long run keeps one core busy at best: by pieces it takes
    half the time (LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends_E)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends_E.int())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, ends_E = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = F.grouped_mm(grad, weight, offs=ends_E.int())
        grad_pieces, x_pieces = (rows.unflatten(0, (-1, SHORTEST_RUN)) for rows in (grad, x))
        parts = torch.bmm(grad_pieces.mT, x_pieces).flatten(1)
        every = torch.arange(len(parts), device=x.device)
        starts_E = F.pad(ends_E[:-1], (1, 0)) // SHORTEST_RUN
        return grad_x, F.embedding_bag(every, parts, starts_E, mode="sum").view_as(weight), None


def _one_token(
    x_1D: Tensor,
    up: Projection,
    out: Projection,
    expert_ids_1K: Tensor,
    expert_weights_1K: Tensor,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """Decoding one token reads K experts in place: sorting and grouping would cost more than it saves."""
    out_1D = torch.zeros_like(x_1D)
    for slot, expert in enumerate(expert_ids_1K[0].tolist()):
        if expert != EMPTY_SLOT:
            y_1D = out.of_one(expert, act(up.of_one(expert, x_1D)))
            out_1D += y_1D * expert_weights_1K[0, slot].to(x_1D.dtype)
    return out_1D
