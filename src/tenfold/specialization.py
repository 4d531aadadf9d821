"""Which experts are used, and which kind of text each prefers."""

import keyword
from dataclasses import dataclass
from itertools import islice

import torch

from tenfold.model.transformer import Transformer
from tenfold.tokenizer import Tokenizer
from tenfold.train.data import TokenData

KINDS = ("whitespace", "keyword", "word", "number", "punctuation", "mixed")

MIN_TOKENS = 50


@dataclass(frozen=True)
class Specialization:
    """For each sparse layer: tokens (kinds, experts) that went to an expert, by kind of token."""

    layers: list[int]
    tokens_by_kind: list[list[list[int]]]

    @property
    def load(self) -> list[list[float]]:
        """Each expert's load, 1 is its fair share: (layers, experts)."""
        totals = [torch.tensor(counts).sum(0) for counts in self.tokens_by_kind]
        return [(total / total.double().mean()).tolist() for total in totals]

    @property
    def preference(self) -> list[list[list[float]]]:
        """How often a kind chooses an expert, over how often all text does: (layers, kinds, experts)."""
        lifts = []
        for counts in self.tokens_by_kind:
            n = torch.tensor(counts, dtype=torch.float64)
            kind = n / n.sum(1, keepdim=True).clamp(min=1)
            overall = n.sum(0) / n.sum()
            lifts.append((kind / overall.clamp(min=1e-12)).tolist())
        return lifts

    def strongest(self, layer: int, count: int = 3) -> list[tuple[int, str, float]]:
        """The clearest preferences of a sparse layer: expert, kind, how many times the usual share.

        Cells of fewer than MIN_TOKENS are left out: their ratios are noise.
        """
        n = torch.tensor(self.tokens_by_kind[layer], dtype=torch.float64)
        lift = torch.tensor(self.preference[layer]) * (n >= MIN_TOKENS)
        best = lift.flatten().argsort(descending=True)[:count].tolist()
        experts = lift.shape[1]
        found = [(i % experts, KINDS[i // experts], float(lift.flatten()[i])) for i in best]
        return [preference for preference in found if preference[2] > 0]


@torch.inference_mode()
def measure(model: Transformer, data: TokenData, seq_len: int, max_tokens: int = 65_536) -> Specialization:
    """Route held-out text through the model and count who went where."""
    kind_of = torch.tensor([kind_of_token(text) for text in token_texts(data.tokenizer)])
    config = model.config
    counts = torch.zeros(len(config.sparse_layers), len(KINDS), config.num_experts, dtype=torch.long)
    batches = max(1, max_tokens // (seq_len * 16))
    for inputs_BS, _ in islice(data.validation_batches(seq_len, 16), batches):
        _, layers = model(inputs_BS, return_aux=True)
        kind_T = kind_of[inputs_BS.flatten()]
        for count_kE, aux in zip(counts, layers, strict=True):
            cell = kind_T[:, None] * config.num_experts + aux.expert_ids_TK
            count_kE += cell.flatten().bincount(minlength=count_kE.numel()).view_as(count_kE)
    return Specialization(config.sparse_layers, counts.tolist())


def token_texts(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]


def kind_of_token(text: str) -> int:
    """Index into KINDS."""
    word = text.strip()
    if not word:
        return KINDS.index("whitespace")
    if keyword.iskeyword(word):
        return KINDS.index("keyword")
    if word.replace("_", "").isalpha():
        return KINDS.index("word")
    if word.isdigit():
        return KINDS.index("number")
    if not any(character.isalnum() for character in word):
        return KINDS.index("punctuation")
    return KINDS.index("mixed")
