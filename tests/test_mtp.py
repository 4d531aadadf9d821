"""Multi-token prediction: transformers' own module, training, and what is kept."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_families import random_fields
from test_parity_transformers import build, load_hf
from transformers import DynamicCache
from transformers.modeling_layers import MtpModel

from tenfold.checkpoint import load_model, save_model
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer
from tenfold.train import train
from tenfold.train.loss import backward
from tenfold.train.settings import TrainSettings

MTP = {"num_nextn_predict_layers": 1}


@pytest.mark.parametrize("seed", range(6))
def test_the_module_is_that_of_transformers(seed: int, tmp_path: Path) -> None:
    ours = build(random_fields("deepseek_v3", seed) | MTP)
    save_model(ours, tmp_path / "m")
    main = load_hf(tmp_path / "m")
    pattern = rf"model\.layers\.{ours.config.num_hidden_layers}.*"
    main._keys_to_ignore_on_load_unexpected = [pattern]  # which says where the module is
    theirs = MtpModel.from_pretrained(main).eval()
    ids = torch.randint(ours.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, _ = ours.hidden_states(ids)
        ahead, _ = ours.states_ahead(hidden, ids)
        positions = torch.arange(8)[None]
        expected = theirs.forward_layer(0, hidden[:, :-1], positions, DynamicCache(), input_ids=ids[:, 1:])
    torch.testing.assert_close(ahead, expected, atol=1e-4, rtol=1e-4)


def test_the_module_survives_saving(tmp_path: Path) -> None:
    ours = build(random_fields("deepseek_v3", 1))
    save_model(ours, tmp_path / "m")
    back = load_model(tmp_path / "m")
    assert len(back.mtp) == 1
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_a_file_without_the_promised_module_is_a_model_without_it(tmp_path: Path) -> None:
    ours = build(random_fields("deepseek_v3", 1))
    save_model(ours, tmp_path / "ours")
    load_hf(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert back.config.num_nextn_predict_layers == 0 and not back.mtp


def test_its_loss_reaches_every_part_of_the_model() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**random_fields("deepseek_v3", 3))).init_weights(0)
    ids = torch.randint(model.config.vocab_size, (2, 12))
    targets = ids.roll(-1, 1)
    settings = TrainSettings(
        mtp_loss=0.3, batch_size=2, seq_len=12, precision="float32", balance_loss=0, z_loss=0
    )
    _, losses = backward(model, ids, targets, settings)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "experts" not in name)

    model.zero_grad()
    hidden, _ = model.hidden_states(ids)
    ahead, _ = model.states_ahead(hidden, ids)
    loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten())
    mtp_loss = F.cross_entropy(model.logits(ahead).flatten(0, 1), targets[:, 1:].flatten())
    (loss + 0.3 * mtp_loss).backward()
    assert losses["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert losses["mtp_loss"] == pytest.approx(mtp_loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


DEEPSEEK = {
    "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "kv_lora_rank": 8,
    "qk_norm": "none", "intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1, "router": "sigmoid",
    "rope_interleave": True, "vocab_size": 300, "mlp_only_layers": (0,), **MTP,
}  # fmt: skip


def test_it_trains_and_is_saved_with_the_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 400)
    settings = TrainSettings(
        data=[str(text)], model=DEEPSEEK, mtp_loss=0.3, bias_update_rate=0.01,
        tokens=20 * 4 * 16, seq_len=16, batch_size=4, evaluations=1,
    )  # fmt: skip
    result = train(settings, tmp_path / "run", resume=False)
    assert result["val_bits_per_byte"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"]
    assert len(lines[-1]["load_cv"]) == 2  # the sparse layer, and the module's
    assert len(load_model(tmp_path / "run" / "model").mtp) == 1


@pytest.mark.parametrize(("mtp_loss", "layers"), [(0.3, 0), (0.0, 1)])
def test_loss_and_module_go_together(mtp_loss: float, layers: int, tmp_path: Path) -> None:
    model = DEEPSEEK | {"num_nextn_predict_layers": layers}
    with pytest.raises(TenfoldError, match=r"mtp_loss .* and num_nextn_predict_layers .* go together"):
        train(TrainSettings(model=model, mtp_loss=mtp_loss), tmp_path / "run", resume=False)
