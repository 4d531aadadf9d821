"""Every decoder family, in random small configs, against transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from random_families import FAMILIES, random_fields
from test_parity_transformers import build, load_hf
from torch import Tensor
from transformers import AutoConfig

from tenfold.checkpoint import families as ours_families
from tenfold.checkpoint import load_model, save_model
from tenfold.checkpoint.families import family_for
from tenfold.config import ModelConfig
from tenfold.engine.kv_cache import new_kv_cache
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer

CONFIGS = [(family, seed) for family in FAMILIES for seed in range(6)]
PROMPT = 13
each = pytest.mark.parametrize(("family", "seed"), CONFIGS, ids=[f"{f}-{s}" for f, s in CONFIGS])


def ids_for(config: ModelConfig, batch: int = 2, length: int = PROMPT) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


@each
@torch.no_grad()
def test_logits_agree_both_ways(family: str, seed: int, tmp_path: Path) -> None:
    ours = build(random_fields(family, seed))
    ids = ids_for(ours.config)
    assert save_model(ours, tmp_path / "ours").model_type == family
    theirs = load_hf(tmp_path / "ours")
    expected = theirs(ids).logits
    close(ours(ids), expected)
    close(load_model(tmp_path / "ours")(ids), ours(ids), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    close(load_model(tmp_path / "theirs")(ids), expected)


@each
@torch.no_grad()
def test_greedy_tokens_agree(family: str, seed: int, tmp_path: Path) -> None:
    """32 of them: with our cache, without it, and transformers' own."""
    ours = build(random_fields(family, seed))
    save_model(ours, tmp_path / "m")
    ids = ids_for(ours.config, batch=1)
    theirs = load_hf(tmp_path / "m").generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert cached(ours, ids, None, 32).tolist() == theirs[:, PROMPT:].tolist()
    whole = ids
    for _ in range(32):
        whole = torch.cat((whole, ours(whole)[:, -1:].argmax(-1)), dim=1)
    assert whole.tolist() == theirs.tolist()


@each
@torch.no_grad()
def test_a_left_padded_batch_is_its_prompts(family: str, seed: int) -> None:
    ours = build(random_fields(family, seed))
    lengths, longest = (PROMPT, 1, 6), PROMPT
    prompts = [ids_for(ours.config, 1, length) for length in lengths]
    batch = torch.cat([F.pad(p, (longest - p.shape[1], 0), value=2) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    logits = ours(batch, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        close(logits[row, longest - prompt.shape[1] :], ours(prompt)[0])
    together = cached(ours, batch, mask, 8)
    alone = torch.cat([cached(ours, prompt, None, 8) for prompt in prompts])
    assert together.tolist() == alone.tolist()


@each
def test_loss_and_router_gradients_agree(family: str, seed: int, tmp_path: Path) -> None:
    ours = build(random_fields(family, seed))
    save_model(ours, tmp_path / "m")
    theirs, ids = load_hf(tmp_path / "m"), ids_for(ours.config)
    loss = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    their_loss = theirs(ids, labels=ids).loss
    close(loss, their_loss, 1e-5)
    loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if is_router(name)}
    routers = {name: p.grad for name, p in ours.named_parameters() if is_router(name) and "mtp" not in name}
    assert len(routers) == len(gradients)
    for (name, gradient), wanted in zip(routers.items(), gradients.values(), strict=True):
        assert gradient is not None and wanted is not None, name
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)
    close(ours.embed_tokens.weight.grad, theirs.get_input_embeddings().weight.grad, 1e-4)


def is_router(name: str) -> bool:
    return ".router." in name or ".mlp.gate.weight" in name


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def cached(model: Transformer, ids: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """Greedy tokens after a batch of prompts, decoded one at a time."""
    start = 0
    cache = new_kv_cache(model.config, len(ids), ids.shape[1] + tokens, torch.float32, ids.device)
    out = []
    for _ in range(tokens):
        token = model(ids, cache, start, mask)[:, -1:].argmax(-1)
        out.append(token)
        start, ids = start + ids.shape[1], token
        mask = None if mask is None else F.pad(mask, (0, 1), value=1)
    return torch.cat(out, dim=1)


def test_every_published_family_is_tested() -> None:
    published = {family.model_type for family in ours_families.FAMILIES} - {"tenfold"}
    published.remove("switch_transformers")  # an encoder-decoder: tests/test_switch.py
    assert set(FAMILIES) == published


PASSED_OVER = {"model_type", "bos_token_id", "eos_token_id", "pad_token_id", "num_nextn_predict_layers"}
"""Special tokens are named by the tokenizer too; a predictor that a config does not mention is left out."""
SHOWN = {"num_attention_heads", "num_key_value_heads", "q_lora_rank"}
"""Wrong guesses at these do not go unnoticed: tensors have other shapes."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_left_out_is_what_transformers_takes(family: str) -> None:
    """Or its absence is refused."""
    config = ModelConfig(**random_fields(family, 3))
    ours = family_for(config)
    raw, read = ours.to_hf(config), 0
    for name in sorted(raw.keys() - PASSED_OVER - SHOWN):
        rope = {"rope_parameters", "rope_scaling", "rope_theta"}
        left = {field: raw[field] for field in raw.keys() - (rope if name in rope else {name})}
        left["model_type"] = family
        try:
            theirs = ours.from_hf(AutoConfig.for_model(**copy.deepcopy(left)).to_dict(), "theirs")
            mine = ours.from_hf(left, "ours")
        except (TenfoldError, StrictDataclassError):
            continue
        for layer in range(mine.num_hidden_layers):
            assert mine.window(layer) == theirs.window(layer), f"window without {name}"
        for field in ModelConfig.model_fields.keys() - PASSED_OVER - {"sliding_window", "layer_types"}:
            assert getattr(mine, field) == getattr(theirs, field), f"{field} without {name}"
        read += 1
    assert read > 5


def test_the_older_name_of_rope_scaling_counts() -> None:
    """As in transformers, where a config has both: what people add to change a context length."""
    config = ModelConfig(**random_fields("llama", 0) | {"rope_scaling": None})
    stretched = family_for(config).to_hf(config) | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    theirs = AutoConfig.for_model(**copy.deepcopy(stretched))
    assert theirs.rope_parameters["rope_type"] == "linear"
    read = family_for(config).from_hf(stretched, "x").rope_scaling
    assert read is not None and (read.rope_type, read.factor) == ("linear", 4.0)


@torch.no_grad()
def test_a_mistral_that_slides_in_some_layers_is_a_ministral(tmp_path: Path) -> None:
    ours = build(random_fields("mistral", 0) | {"num_hidden_layers": 2, "sliding_window": 3})
    save_model(ours, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    ids = ids_for(ours.config)
    close(load_model(tmp_path / "m")(ids), load_hf(tmp_path / "m")(ids).logits)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_shared_experts_are_not_left_out_unsaid(family: str, tmp_path: Path) -> None:
    save_model(build(random_fields(family, 0)), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"n_shared_experts": 0}))
    with pytest.raises(TenfoldError, match=r"tensor .*shared_experts.* has no place in"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_a_last_layer_is_not_left_out_unsaid(family: str, tmp_path: Path) -> None:
    """It stands where a predictor would."""
    three = {"num_hidden_layers": 3, "mlp_only_layers": (), "num_nextn_predict_layers": 0}
    save_model(build(random_fields(family, 0) | three), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(TenfoldError, match=r"tensor model.layers.2.* has no place in"):
        load_model(tmp_path / "m")
