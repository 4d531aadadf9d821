"""The stacked Muon against torch's, the parameter groups, and the schedule."""

import pytest
import torch

from tenfold.config import ModelConfig
from tenfold.model.transformer import Transformer
from tenfold.train.muon import StackedMuon
from tenfold.train.optimizer import schedule, split_parameters
from tenfold.train.settings import TrainSettings


@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 16, 8), (2, 8, 8)])
def test_stacked_muon_equals_torch_muon_on_each_expert(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(shape))
    start = stack.detach().clone()
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    ours = StackedMuon([stack], lr=0.1, weight_decay=0.1)
    theirs = torch.optim.Muon(singles, lr=0.1, weight_decay=0.1)
    for _ in range(4):
        stack.grad = torch.randn(shape)
        for single, grad in zip(singles, stack.grad, strict=True):
            single.grad = grad.clone()
        ours.step()
        theirs.step()
    for mine, single, first in zip(stack, singles, start, strict=True):
        # Both iterate in bfloat16, rounding in another order.
        assert (mine - single).norm() < 0.03 * (single - first).norm()


def test_each_parameter_has_one_optimizer() -> None:
    config = ModelConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    model = Transformer(config)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, stacks, rest = ([names[id(p)] for p in part] for part in split_parameters(model))
    assert sorted(matrices + stacks + rest) == sorted(names.values())
    assert all("experts" in name for name in stacks)
    assert any("q_proj" in name for name in matrices)
    assert {"embed_tokens.weight", "lm_head.weight", "layers.0.mlp.router.weight"} <= set(rest)


def test_schedule_warms_up_stays_and_decays() -> None:
    run = TrainSettings(tokens=100 * 32 * 256, warmup=0.1, decay=0.4)
    factors = [schedule(step, run) for step in range(run.steps)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:60] == [1.0] * 50
    assert factors[80] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.05
