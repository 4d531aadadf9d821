"""How much each column of each matrix matters: its mean squared input while the model reads some text.

What a matrix multiplies is y = W x, so the mean squared error that rounding W adds to y is the sum over
columns of E[x²] times the squared error there, as far as columns are uncorrelated.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from tenfold.checkpoint import load_config
from tenfold.checkpoint.store import load_model
from tenfold.errors import TenfoldError
from tenfold.kernels import ACTIVATIONS
from tenfold.memory import check_fits
from tenfold.model.moe import Experts
from tenfold.model.transformer import Transformer
from tenfold.tokenizer import load_tokenizer

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]

MAX_TOKENS, WINDOW = 4096, 512
ENOUGH = 32
"""Tokens from which an expert's own mean is taken; one that saw fewer has its layer's."""
FLOOR, SMALLEST = 1e-3, 1e-30
"""What a column counts at least: that share of the mean over columns, and a number whose square root is no
denormal. The text is a sample, and where nothing counted, any rounding would seem the best."""
MAX_CHARACTERS = 1 << 20
"""Of the text, more than any tokenizer makes `MAX_TOKENS` of."""


def read_text(file: Path) -> str:
    """The beginning of a text file. Raises TenfoldError if it is empty or not UTF-8 text."""
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(MAX_CHARACTERS)
    except OSError as error:
        raise TenfoldError(f"{file}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise TenfoldError(f"{file}: not UTF-8 text, which calibration needs") from None
    if not text.strip():
        raise TenfoldError(f"{file}: no text there to calibrate with")
    return text


def calibrate(path: Path, text: str) -> dict[str, Tensor]:
    """`importance` to the model at `path`, loaded whole in bf16, from the first `MAX_TOKENS` of `text`.

    Raises TenfoldError where the model does not fit the memory, or its tokenizer does not fit the model.
    """
    config = load_config(path)
    check_fits(2 * config.num_params(), f"{path} in bfloat16", "pack it without --calibrate")
    tokens = load_tokenizer(path).encode(text)[:MAX_TOKENS]
    if not tokens or max(tokens) >= config.vocab_size:
        raise TenfoldError(f"{path}: its tokenizer makes no tokens of this model out of the calibration text")
    with Console(stderr=True).status("reading the calibration text"):
        model = load_model(path, torch.bfloat16)
        assert isinstance(model, Transformer)
        return importance(model, torch.tensor(tokens))


@torch.inference_mode()
def importance(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """Mean squared inputs in float32 by the name of our tensor: (K,) of a matrix, (E, K) of stacked experts.

    `tokens` (T,) are read in windows of `WINDOW`. What goes into an expert's down projection is counted
    with the weight that the router gives it. Raises TenfoldError where an input is NaN or infinite.
    """
    meter = _Meter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            tied = model.config.tie_word_embeddings and module is model.lm_head
            module.register_forward_pre_hook(
                meter.linear("embed_tokens.weight" if tied else f"{name}.weight")
            )
        elif isinstance(module, Experts):
            module.register_forward_pre_hook(meter.experts(name))
    for window in tokens.split(min(WINDOW, model.config.max_position_embeddings)):
        model(window[None])
    return meter.means()


class _Meter:
    """Adds up what the hooks that it makes see."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def linear(self, name: str) -> Hook:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TK = inputs[0].flatten(0, -2)
            self._add(name, _squares(x_TK), torch.tensor(len(x_TK)))

        return hook

    def experts(self, name: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Experts)
            x_TD, ids_TK, weights_TK = inputs
            seen = [torch.where(ids_TK == expert) for expert in range(len(module.down))]
            into_down = [
                _hidden(module, expert, x_TD[token]) * weights_TK[token, slot, None]
                for expert, (token, slot) in enumerate(seen)
            ]
            counts = torch.tensor([len(token) for token, _ in seen])
            self._add(f"{name}.gate_up", torch.stack([_squares(x_TD[token]) for token, _ in seen]), counts)
            self._add(f"{name}.down", torch.stack([_squares(hidden) for hidden in into_down]), counts)

        return hook

    def _add(self, name: str, squares: Tensor, tokens: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + squares
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def means(self) -> dict[str, Tensor]:
        return {name: _floored(name, _mean(s, self.tokens[name])) for name, s in self.sums.items()}


def _mean(squares: Tensor, tokens: Tensor) -> Tensor:
    """(K,) over all tokens; (E, K) over each expert's own, or its layer's where those are too few."""
    if squares.ndim == 1:
        return squares / tokens
    of_layer = squares.sum(0) / tokens.sum()
    few = (tokens < ENOUGH)[:, None]
    return torch.where(few, of_layer, squares / tokens.clamp(min=1)[:, None])


def _floored(name: str, mean_K: Tensor) -> Tensor:
    """Each row with `FLOOR` of its mean as the least."""
    floored = torch.maximum(mean_K, FLOOR * mean_K.mean(-1, keepdim=True)).clamp(min=SMALLEST)
    if not bool(floored.isfinite().all()):
        raise TenfoldError(
            f"the inputs of {name} overflow, or are NaN, while the model reads the calibration text:"
            " pack it without --calibrate"
        )
    return floored


def _hidden(experts: Experts, expert: int, x_TD: Tensor) -> Tensor:
    """What an expert's down projection multiplies."""
    biases = experts.gate_up_bias
    bias = biases[expert] if isinstance(biases, Tensor) else None
    return ACTIVATIONS[experts.activation](F.linear(x_TD, experts.gate_up[expert], bias))


def _squares(x_TK: Tensor) -> Tensor:
    return x_TK.float().square().sum(0)
