"""How well a model predicts text it has not seen."""

import torch
import torch.nn.functional as F

from tenfold.device import autocast
from tenfold.model.transformer import Transformer
from tenfold.train.data import TokenData


@torch.inference_mode()
def bits_per_byte(
    model: Transformer, data: TokenData, seq_len: int, batch_size: int, precision: str
) -> float:
    """Bits per byte over the whole held-out text, each token predicted within its window."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    for inputs_BS, targets_BS in data.validation_batches(seq_len, batch_size):
        with autocast(device, precision):
            logits_BSV = model(inputs_BS.to(device))
        targets_T = targets_BS.to(device).flatten()
        nats += F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_T, reduction="sum").item()
        tokens += len(targets_T)
    model.train(was_training)
    return data.bits_per_byte(nats, tokens)
