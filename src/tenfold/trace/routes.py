"""What the routers choose while a model reads a window of text, and what they would have a layer earlier."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import compiled
from tenfold.config import ModelConfig
from tenfold.device import one_torch_thread
from tenfold.engine.packed import PackedRunner
from tenfold.engine.packed_batch import PackedPass
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel

NORM = "post_attention_layernorm"
"""What stands between the halves of a layer."""
Route = Callable[[int], Tensor]
"""The experts (T, K) that a layer's router chooses of the residual stream as it is now."""


class Routes:
    """Of one window: `chosen` and `ahead`, by layer, are what was seen of it, (T, K) a piece of text."""

    def __init__(self, config: ModelConfig):
        self._sparse = set(config.sparse_layers)
        self.chosen: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.ahead: defaultdict[int, list[Tensor]] = defaultdict(list)

    def look(self, layer: int, route: Route) -> None:
        """Between the attention of `layer` and its feed-forward."""
        if layer in self._sparse:
            self.chosen[layer].append(route(layer))
        if layer + 1 in self._sparse:
            self.ahead[layer + 1].append(route(layer + 1))


class RoutingRunner(PackedRunner):
    """A packed model that lets `look` see between the halves of each layer. One sequence.

    Layers run one at a time, so recording costs generation nothing.
    """

    def __init__(self, model: PackedModel, capacity: int, look: Callable[[int, Route], None]):
        super().__init__(model, 1, capacity)
        self._look, native = look, self.runner.native
        sparse = self.config.sparse_layers
        self._routers = {n: native.router(f"layers.{n}.mlp.router.") for n in sparse}
        self._norms = {n: native.address(f"layers.{n}.{NORM}.weight") for n in sparse}

    def run(self, passed: PackedPass) -> None:
        passed.all_rows = True
        for n in range(self.config.num_hidden_layers):
            passed.advance(1)
            self._look(n, lambda layer: self._route(layer, passed.x_TD))

    def _route(self, layer: int, x_TD: Tensor) -> Tensor:
        config, tokens = self.config, len(x_TD)
        normed = torch.empty_like(x_TD)
        sizes = (tokens, config.hidden_size, config.rms_norm_eps)
        compiled.module().rms_norm(x_TD.data_ptr(), self._norms[layer], *sizes, normed.data_ptr())
        ids = torch.empty(tokens, config.num_experts_per_tok, dtype=torch.int32)
        weights = torch.empty(ids.shape)
        self._routers[layer](normed.data_ptr(), tokens, ids.data_ptr(), weights.data_ptr())
        return ids


@torch.inference_mode()
def packed_routes(model: PackedModel, windows: Iterator[Tensor], capacity: int) -> Iterator[Routes]:
    """Of each window of token ids (T,), at most `capacity` long, read from its first token on."""
    routes = Routes(model.config)
    runner = RoutingRunner(model, capacity, lambda *seen: routes.look(*seen))
    for window_T in windows:
        routes = Routes(model.config)
        runner.reset()
        with one_torch_thread():
            runner.forward(window_T[None])
        yield routes


@torch.inference_mode()
def torch_routes(model: Transformer, windows: Iterator[Tensor]) -> Iterator[Routes]:
    """As `packed_routes`, of a model of floating-point weights."""
    device = model.embed_tokens.weight.device
    for window_T in windows:
        routes = Routes(model.config)
        with _looking(model, routes):
            model.hidden_states(window_T[None].to(device))
        yield routes


@contextmanager
def _looking(model: Transformer, routes: Routes) -> Iterator[None]:
    def before_norm(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, inputs: routes.look(layer, lambda n: _route(model, n, inputs[0]))

    norms = [model.get_submodule(f"layers.{n}.{NORM}") for n in range(model.config.num_hidden_layers)]
    hooks = [norm.register_forward_pre_hook(before_norm(n)) for n, norm in enumerate(norms)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _route(model: Transformer, n: int, x_BSD: Tensor) -> Tensor:
    norm, router = (model.get_submodule(f"layers.{n}.{name}") for name in (NORM, "mlp.router"))
    ids_TK: Tensor = router(norm.forward(x_BSD))[2].expert_ids_TK  # norm(x) would look again
    return ids_TK
