"""Balance losses against their formulas, their gradients, the bias update, and the metrics."""

import math

import pytest
import torch

from tenfold.config import ModelConfig
from tenfold.model.router import RouterAux
from tenfold.model.transformer import Transformer
from tenfold.train import balance, locality
from tenfold.train.metrics import RoutingMeter
from tenfold.train.settings import TrainSettings

SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "head_dim": 4}
LOSSES = {
    "balance_loss": balance.load_balancing_loss,
    "sequence_loss": balance.sequence_loss,
    "z_loss": balance.z_loss,
    "locality_loss": locality.locality_loss,
}


def aux_of(logits_TE: torch.Tensor, top_k: int, batch: int) -> RouterAux:
    ids = logits_TE.topk(top_k).indices
    load = ids.flatten().bincount(minlength=logits_TE.shape[-1])
    return RouterAux(logits_TE, logits_TE.softmax(-1), load, torch.tensor(0), ids, batch)


def test_load_balancing_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    aux = aux_of(torch.randn(12, 4), 2, 3)
    want = 0.0
    for expert in range(4):
        f = sum(expert in row for row in aux.expert_ids_TK.tolist()) / 24
        p = sum(row[expert] for row in aux.probs_TE.tolist()) / 12
        want += 4 * f * p
    assert float(balance.load_balancing_loss(aux)) == pytest.approx(want, rel=1e-5)


def test_sequence_loss_is_the_balancing_loss_of_each_sequence() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 4)
    each = [balance.load_balancing_loss(aux_of(part, 2, 1)) for part in logits.split(4)]
    got = balance.sequence_loss(aux_of(logits, 2, 3))
    assert float(got) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_z_loss_is_the_formula() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    want = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    assert float(balance.z_loss(aux_of(logits, 1, 1))) == pytest.approx(want, rel=1e-5)


def test_locality_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    B, S, E, keep = 3, 5, 4, 1 - 1 / locality.MEMORY_TOKENS
    aux = aux_of(torch.randn(B * S, E), 2, B)
    chosen = [set(row) for row in aux.expert_ids_TK.tolist()]
    recent = [
        [sum((1 - keep) * keep**age * (e in chosen[t - 1 - age]) for age in range(t % S)) for e in range(E)]
        for t in range(B * S)
    ]
    mean = [sum(row[e] for row in recent) / (B * S) for e in range(E)]
    reused = [
        sum(p * (recent[t][e] - mean[e]) for e, p in enumerate(probs))
        for t, probs in enumerate(aux.probs_TE.tolist())
    ]
    assert float(locality.locality_loss(aux)) == pytest.approx(1 - sum(reused) / (B * S), rel=1e-5)


def test_locality_is_of_texts_not_of_experts() -> None:
    """Sequences that keep to experts of their own gain; the same few experts for all gain nothing."""
    own = torch.eye(4).repeat_interleave(16, dim=0) * 9
    assert float(locality.locality_loss(aux_of(own, 1, 4))) < 0.7
    same = torch.eye(4)[0].expand(64, 4) * 9
    assert float(locality.locality_loss(aux_of(same, 1, 4))) == pytest.approx(1, abs=1e-4)


def test_a_collapsed_layer_is_not_hidden_by_the_others() -> None:
    """Each layer alone, then the mean: pooled, two opposite collapses would look even."""
    one = torch.full((8, 2), 0.0)
    one[:, 0] = 9.0
    layers = [aux_of(one, 1, 1), aux_of(one.flip(-1), 1, 1)]
    loss = balance.total_loss(layers, TrainSettings(balance_loss=1.0, z_loss=0.0))
    assert float(loss) > 1.9


@pytest.mark.parametrize("router", ["softmax", "topk_softmax", "sigmoid", "switch", "expert_choice"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_every_loss_reaches_the_router(router: str, loss: str) -> None:
    fields = SPARSE | ({"num_experts_per_tok": 1} if router == "switch" else {})
    model = Transformer(ModelConfig(**SMALL, **fields, router=router)).init_weights(0)
    _, layers = model(torch.randint(0, 32, (2, 8)), return_aux=True)
    off = dict.fromkeys(LOSSES, 0.0)
    balance.total_loss(layers, TrainSettings(**{**off, loss: 1.0})).backward()
    for one in balance.routers(model):
        assert one.weight.grad is not None and one.weight.grad.norm() > 0


@pytest.mark.parametrize("router", ["softmax", "topk_softmax", "sigmoid", "switch", "expert_choice"])
def test_gradient_of_the_language_model_loss_reaches_the_router(router: str) -> None:
    fields = SPARSE | ({"num_experts_per_tok": 1} if router == "switch" else {})
    model = Transformer(ModelConfig(**SMALL, **fields, router=router)).init_weights(0)
    model(torch.randint(0, 32, (2, 8))).square().mean().backward()
    for one in balance.routers(model):
        assert one.weight.grad is not None and one.weight.grad.norm() > 0


def test_bias_update_evens_out_the_load() -> None:
    """Overloaded experts fall, idle ones rise, by `rate` a step, as a hook of the optimizer."""
    model = Transformer(ModelConfig(**SMALL, **SPARSE, router="sigmoid")).init_weights(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    update = balance.BiasUpdate(model, rate=0.001)
    update.attach(optimizer)
    ids = torch.randint(0, 32, (4, 16))
    _, layers = model(ids, return_aux=True)
    update.loads = [aux.load_E for aux in layers]
    optimizer.step()
    for router, aux in zip(balance.routers(model), layers, strict=True):
        want = 0.001 * torch.sign(aux.load_E.float().mean() - aux.load_E)
        torch.testing.assert_close(router.bias, want)
    spread = max(float(aux.load_E.float().std()) for aux in layers)
    for _ in range(60):
        _, layers = model(ids, return_aux=True)
        update.loads = [aux.load_E for aux in layers]
        optimizer.step()
    assert max(float(aux.load_E.float().std()) for aux in layers) < 0.5 * spread


def test_metrics_of_a_known_routing() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0]])
    aux = aux_of(logits, 1, 1)
    aux.dropped = torch.tensor(1)
    meter = RoutingMeter()
    meter.observe([aux])
    meter.observe([aux])
    summary = meter.summary()
    assert summary["max_vio"] == [pytest.approx(2.0)]
    assert summary["dead_experts"] == [2]
    assert summary["load_cv"] == [pytest.approx(1.5**0.5)]
    assert summary["dropped"] == [pytest.approx(0.25)]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert summary["router_entropy"] == [pytest.approx(float(entropy), rel=1e-3)]
