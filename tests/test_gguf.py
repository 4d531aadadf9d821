"""Models in GGUF files: the same numbers as the model that was written, and as transformers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import ARCHITECTURES, expressible, quantise, write_model
from test_parity_transformers import build, load_hf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tenfold.checkpoint import load_model, save_model
from tenfold.config import ModelConfig

CONFIGS = [(family, seed) for family in ARCHITECTURES for seed in range(6)]
each = pytest.mark.parametrize(("family", "seed"), CONFIGS, ids=[f"{f}-{s}" for f, s in CONFIGS])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def ids_for(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(3))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@each
@torch.no_grad()
def test_what_was_written_is_loaded_and_saved(family: str, seed: int, tmp_path: Path, file: Path) -> None:
    model = build(expressible(family, seed))
    write_model(file, model, split_kv_b=seed % 2 == 0, fused_experts=seed % 3 == 0)
    loaded = load_model(file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    ids = ids_for(model.config)
    assert torch.equal(loaded(ids), model(ids))
    assert save_model(loaded, tmp_path / "saved").model_type == family
    close(load_hf(tmp_path / "saved")(ids).logits, model(ids))


PLAIN = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "initializer_range": 0.3,
    "qk_norm": "none",
}
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
# Where transformers has no reading for a key, its own default has to do: 128, 1408, 5632, 768.
THEIRS = {
    "llama": PLAIN,
    "llama-tied": {**PLAIN, "tie_word_embeddings": True, "rope_theta": 5e5, "num_key_value_heads": 1},
    "qwen3": {**PLAIN, "head_dim": 128, "qk_norm": "head", "hidden_size": 17},
    "qwen3_moe": {**PLAIN, **FEW, "moe_intermediate_size": 768, "qk_norm": "head"},
    "qwen2_moe": {
        **PLAIN,
        **FEW,
        "norm_topk_prob": False,
        "attention_bias": True,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "shared_expert_gate": True,
    },
}


def load_hf_gguf(file: Path) -> torch.nn.Module:
    """transformers' own reading of a GGUF file; its `from_pretrained` wants accelerate beside that."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    problems = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(problems.missing_keys) <= tied and not problems.unexpected_keys
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_transformers_reads_the_same_model(name: str, file: Path) -> None:
    model = build(THEIRS[name] | {"model_type": name.removesuffix("-tied")})
    write_model(file, model)
    ids = ids_for(model.config)
    close(load_model(file)(ids), load_hf_gguf(file)(ids).logits)


WHOLE_BLOCKS = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 32,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT_BLOCKS = {
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "shared_expert_intermediate_size": 0,
}
QUANTISED = dict(
    zip(
        ARCHITECTURES,
        (
            Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
            Kind.BF16, Kind.F16, Kind.Q8_0, Kind.Q4_0, Kind.MXFP4,
        ),
        strict=True,
    )
)  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), QUANTISED.items())
@torch.no_grad()
def test_quantised_weights_are_what_the_gguf_package_decodes(family: str, kind: Kind, file: Path) -> None:
    fields = expressible(family, 3)
    blocks = WHOLE_BLOCKS | (LATENT_BLOCKS if family.startswith("deepseek") else {})
    fields |= {name: value for name, value in blocks.items() if fields.get(name)}
    model = build(fields)
    write_model(file, model, kind, split_kv_b=False)
    quantise(model, kind)
    assert torch.equal(load_model(file)(ids_for(model.config)), model(ids_for(model.config)))
