"""How well a model predicts text it has not seen."""

import torch

from tenfold.device import autocast
from tenfold.model.transformer import Transformer
from tenfold.train.data import TokenData
from tenfold.train.loss import nats_by_piece


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
            hidden_BSD, _ = model.hidden_states(inputs_BS.to(device))
        targets_BS = targets_BS.to(device)
        nats += sum(part.item() for part in nats_by_piece(model, hidden_BSD, targets_BS, precision))
        tokens += targets_BS.numel()
    model.train(was_training)
    return data.bits_per_byte(nats, tokens)
