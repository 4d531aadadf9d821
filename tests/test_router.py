"""Every router against a loop in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.kernels import EMPTY_SLOT
from tenfold.model.router import Router, drop_over_capacity
from tenfold.model.transformer import Transformer


def make(router: str, experts: int, top_k: int, **fields: object) -> Router:
    config = ModelConfig(
        hidden_size=8,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=4,
        router=router,
        **fields,
    )
    made = Router(config)
    torch.nn.init.normal_(made.weight)
    return made


def scores_of(router: Router, x_TD: Tensor) -> list[list[float]]:
    return (x_TD.double() @ router.weight.double().T).tolist()


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def best(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def reference(router: Router, logits: list[float]) -> dict[int, float]:
    """Expert -> weight for one token, as the papers say it."""
    config = router.config
    E, K = config.num_experts, config.num_experts_per_tok
    if config.router == "switch":
        probs = softmax(logits)
        return {e: probs[e] for e in best(probs, 1)}
    if config.router == "topk_softmax":
        chosen = best(logits, K)
        weights = softmax([logits[e] for e in chosen])
    else:
        sigmoid = config.router == "sigmoid"
        scores = [1 / (1 + math.exp(-v)) for v in logits] if sigmoid else softmax(logits)
        ranked = list(scores)
        if sigmoid:
            ranked = [s + b for s, b in zip(scores, router.bias.double().tolist(), strict=True)]
        if config.n_group > 1:
            size, counted = E // config.n_group, 2 if sigmoid else 1
            groups = [ranked[g * size : (g + 1) * size] for g in range(config.n_group)]
            kept = best([sum(sorted(g)[-counted:]) for g in groups], config.topk_group)
            ranked = [r if e // size in kept else -math.inf for e, r in enumerate(ranked)]
        chosen = best(ranked, K)
        weights = [scores[e] for e in chosen]
        if config.norm_topk_prob:
            weights = [w / sum(weights) for w in weights]
    scale = config.routed_scaling_factor
    return {e: w * scale for e, w in zip(chosen, weights, strict=True)}


@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("softmax", {"norm_topk_prob": True}),
        ("softmax", {"norm_topk_prob": False, "routed_scaling_factor": 1.5}),
        ("topk_softmax", {}),
        ("sigmoid", {}),
        ("sigmoid", {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    ],
)
def test_router_equals_a_float64_loop(name: str, fields: dict[str, object], top_k: int) -> None:
    torch.manual_seed(top_k)
    check(make(name, 8, top_k, **fields))


@pytest.mark.parametrize(("groups", "kept", "top_k"), [(2, 1, 3), (4, 2, 4), (4, 3, 2)])
@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_group_limited_choice(router: str, groups: int, kept: int, top_k: int) -> None:
    torch.manual_seed(groups)
    check(make(router, 8, top_k, n_group=groups, topk_group=kept))


def test_switch_takes_the_best_at_its_own_probability() -> None:
    check(make("switch", 8, 1).eval())


def check(router: Router) -> None:
    if router.config.router == "sigmoid":
        router.bias.normal_()
    x_BSD = torch.randn(2, 25, 8)
    ids, weights, aux = router(x_BSD)
    for token, logits in enumerate(scores_of(router, x_BSD.flatten(0, 1))):
        wanted = reference(router, logits)
        got = dict(zip(ids[token].tolist(), weights[token].tolist(), strict=True))
        assert got.keys() == wanted.keys()
        assert all(got[e] == pytest.approx(wanted[e], rel=1e-5) for e in wanted)
    assert aux.load_E.tolist() == [(ids == e).sum() for e in range(8)]
    torch.testing.assert_close(aux.probs_TE.sum(-1), torch.ones(50))


def test_bias_changes_the_choice_and_never_the_weights() -> None:
    router = make("sigmoid", 8, 2)
    x_BSD = torch.randn(1, 20, 8)
    plain = router(x_BSD)
    router.bias[3] = 100.0
    ids, weights, _ = router(x_BSD)
    assert (ids == 3).any(-1).all()
    scores = torch.sigmoid(x_BSD[0] @ router.weight.T).gather(-1, ids)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    assert not torch.equal(plain[0], ids)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.floats(0.1, 3.0),
)
def test_capacity_drops_the_late_ones(ids: list[int], factor: float) -> None:
    experts, capacity = 5, math.ceil(factor * len(ids) / 5)
    ids_T1 = torch.tensor(ids)[:, None]
    kept, dropped = drop_over_capacity(ids_T1, torch.tensor(ids).bincount(minlength=experts), factor)
    room, wanted = [capacity] * experts, []
    for expert in ids:
        wanted.append(expert if room[expert] > 0 else EMPTY_SLOT)
        room[expert] -= 1
    assert kept.flatten().tolist() == wanted
    assert dropped == wanted.count(EMPTY_SLOT)


def test_switch_drops_in_training_only() -> None:
    router = make("switch", 4, 1, capacity_factor=0.5)
    x_BSD = torch.randn(1, 64, 8)
    assert (router.train()(x_BSD)[0] == EMPTY_SLOT).any()
    assert not (router.eval()(x_BSD)[0] == EMPTY_SLOT).any()


def test_expert_choice_gives_every_expert_its_best_tokens() -> None:
    router = make("expert_choice", 4, 2)
    x_BSD = torch.randn(1, 10, 8)
    ids, weights, aux = router(x_BSD)
    probs = [softmax(row) for row in scores_of(router, x_BSD[0])]
    for expert in range(4):
        column = [row[expert] for row in probs]
        token, slot = torch.where(ids == expert)
        assert sorted(token.tolist()) == sorted(best(column, 5))
        for t, s in zip(token.tolist(), slot.tolist(), strict=True):
            assert weights[t, s].item() == pytest.approx(column[t], rel=1e-5)
    assert aux.load_E.tolist() == [5] * 4
    assert (weights[ids == EMPTY_SLOT] == 0).all()


def test_expert_choice_refuses_to_generate() -> None:
    config = ModelConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router="expert_choice"
    )
    model = Transformer(config).init_weights(0)
    with pytest.raises(TenfoldError, match="future"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=[])


def test_router_computes_in_float32_under_autocast() -> None:
    router = make("softmax", 8, 2)
    x_BSD = torch.randn(1, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, _, aux = router(x_BSD)
    torch.testing.assert_close(aux.logits_TE, x_BSD[0] @ router.weight.T, rtol=0, atol=1e-6)
