"""Packed models through the engine: every family against the torch model of the same weights."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_families import FAMILIES, random_fields
from test_cli import run
from texts import TEXTS
from torch import Tensor

from tenfold import compiled
from tenfold.checkpoint import load_model, save_model
from tenfold.checkpoint.pack.packing import pack
from tenfold.config import ModelConfig
from tenfold.engine.generation import Generation, generate_tokens
from tenfold.engine.loading import load_model_and_tokenizer
from tenfold.engine.packed import PIECE, PackedRunner
from tenfold.errors import TenfoldError
from tenfold.formats import Packing
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedModel, packed_of
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import Tokenizer, train_bpe

pytestmark = pytest.mark.skipif(not compiled.available(), reason="no compiled kernels in this installation")


def build(fields: dict[str, object], seed: int = 0) -> Transformer:
    """Weights that bf16 holds exactly; biases, norms and sinks that matter."""
    model = Transformer(ModelConfig.parse(fields, "test")).init_weights(seed).eval()
    torch.manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.ndim == 1 or name.endswith("_bias"):
            tensor.data = torch.randn_like(tensor) / 10 + ("norm" in name)
        tensor.data = tensor.data.bfloat16().float()
    return model


def stepwise(runner: PackedRunner, ids_BS: Tensor, prompt: int) -> Tensor:
    """Logits (B, S - prompt + 1, V) after the prompt and after each token that follows it."""
    logits = [runner.forward(ids_BS[:, :prompt])]
    logits += [runner.forward(ids_BS[:, n : n + 1]) for n in range(prompt, ids_BS.shape[1])]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("packed", [True, False])
def test_a_cache_beyond_the_memory_is_refused(packed: bool) -> None:
    """A context that claims to be endless, and someone who asks for all of it."""
    model = build({**random_fields("qwen3_moe", 0), "max_position_embeddings": 2**31 - 1})
    params = SamplingParams(max_tokens=2**31)
    with pytest.raises(TenfoldError, match=r"a KV cache for 2,147,483,647 tokens needs .* GiB"):
        next(generate_tokens(packed_of(model) if packed else model, [1], params))


def errors(got_BSV: Tensor, wanted_BSV: Tensor) -> Tensor:
    return (got_BSV - wanted_BSV).norm(dim=-1) / wanted_BSV.norm(dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [0, 2, 3])
@torch.inference_mode()
def test_every_family_as_torch_computes_it(family: str, seed: int) -> None:
    model = build(random_fields(family, seed), seed)
    ids_BS = torch.randint(0, model.config.vocab_size, (3, 27))
    wanted = model(ids_BS)[:, 20:]
    got = stepwise(PackedRunner(packed_of(model, "bf16", "bf16"), 3, 27), ids_BS, 21)
    # Activations and cache are bf16 here. Where two experts score alike, that may choose the other one.
    assert errors(got, wanted).median() < 0.02
    assert errors(got, wanted).quantile(0.8) < 0.06


SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 40, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "max_position_embeddings": 4096, "initializer_range": 0.3,
}  # fmt: skip
DENSE = SHAPE | {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}


@pytest.mark.parametrize("isa", compiled.module().isas() if compiled.available() else [])
@torch.inference_mode()
def test_every_instruction_set_says_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_of(build(DENSE), "q4", "q8")
    ids_BS = torch.randint(0, 97, (2, 40))
    wanted = stepwise(PackedRunner(model, 2, 40), ids_BS, 35)
    monkeypatch.setenv("TENFOLD_ISA", isa)
    assert errors(stepwise(PackedRunner(model, 2, 40), ids_BS, 35), wanted).max() < 0.02


SWITCH = {"router": "switch", "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    "fields", [DENSE | {"rope_interleave": True}, SHAPE | SWITCH], ids=["rope", "switch"]
)
@torch.inference_mode()
def test_options_of_no_published_family(fields: dict[str, object]) -> None:
    model = build(fields)
    ids_BS = torch.randint(0, 97, (3, 27))
    got = stepwise(PackedRunner(packed_of(model, "bf16", "bf16"), 3, 27), ids_BS, 21)
    assert errors(got, model(ids_BS)[:, 20:]).median() < 0.02


@pytest.mark.parametrize("window", [None, 40])
@torch.inference_mode()
def test_attention_over_many_blocks(window: int | None) -> None:
    """More positions than one block of the cache, more heads to a key head than one tile."""
    heads = {"num_attention_heads": 34, "num_key_value_heads": 2, "head_dim": 10, "attention_sinks": True}
    model = build(DENSE | heads | {"sliding_window": window})
    ids_BS = torch.randint(0, 97, (2, 140))
    got = stepwise(PackedRunner(packed_of(model, "bf16", "bf16"), 2, 140), ids_BS, 100)
    assert errors(got, model(ids_BS)[:, 99:]).max() < 0.02


@torch.inference_mode()
def test_a_prompt_in_pieces_and_a_batch_of_sequences() -> None:
    """A long prompt goes through the layers in pieces, and no sequence sees another."""
    model = packed_of(build(DENSE | {"sliding_window": 50}), "bf16", "bf16")
    ids_BS = torch.randint(0, 97, (2, PIECE + 100))
    whole = PackedRunner(model, 2, ids_BS.shape[1]).forward(ids_BS)
    alone = [PackedRunner(model, 1, ids_BS.shape[1]).forward(row[None])[0] for row in ids_BS]
    assert errors(whole, torch.stack(alone)).max() < 0.02
    runner = PackedRunner(model, 2, ids_BS.shape[1])
    runner.forward(ids_BS[:, :7])
    runner.reset()
    assert runner.forward(ids_BS).equal(whole)


@torch.inference_mode()
def test_q8_is_near_and_q4_not_far() -> None:
    model = build(DENSE)
    ids_BS = torch.randint(0, 97, (4, 30))
    wanted = model(ids_BS)[:, 20:]
    q8, q4 = (
        errors(stepwise(PackedRunner(packed_of(model, "q8", rest), 4, 30), ids_BS, 21), wanted).median()
        for rest in ("q8", "q4")
    )
    assert q8 < 0.04 < q4 < 0.4


@pytest.mark.parametrize("prompt", [1, 5, 12])
@torch.inference_mode()
def test_latent_attention_has_windows_too(prompt: int) -> None:
    latent = {
        "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 8, "head_dim": 6,
        "num_key_value_heads": 4, "qk_norm": "none", "sliding_window": 4,
    }  # fmt: skip
    model = build(DENSE | latent)
    ids_BS = torch.randint(0, 97, (2, 20))
    got = stepwise(PackedRunner(packed_of(model, "bf16", "bf16"), 2, 20), ids_BS, prompt)
    # Folded queries and what they see are bf16 too. One more or less in the window is off by over 1.
    off = errors(got, model(ids_BS)[:, prompt - 1 :])
    assert off.max() < 0.05 and off.median() < 0.02


def damaged() -> PackedModel:
    """Token 5 makes values that are infinite, token 0 values that are zero."""
    model = build(DENSE)
    for layer in model.layers:
        layer.self_attn.v_proj.weight.data.fill_(1e38)
    model.embed_tokens.weight.data[0], model.embed_tokens.weight.data[5] = 0, 1
    return packed_of(model, "bf16", "bf16")


def test_a_reset_leaves_nothing_behind() -> None:
    runner = PackedRunner(damaged(), 1, 32)
    assert not runner.forward(torch.full((1, 20), 5)).isfinite().any()
    runner.reset()
    assert runner.forward(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_token_is_made_of_what_is_no_number(temperature: float) -> None:
    with pytest.raises(TenfoldError, match="logits are NaN or infinite"):
        next(generate_tokens(damaged(), [5], SamplingParams(temperature=temperature)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[3, 97]], "token id 97 is none of the model's, which are 0 to 96"),
        ([[-1, 3]], "token id -1"),
        ([[3], [4]], r"shape \(2, 1\) must be \(1, 1 or more\)"),
        ([[]], r"shape \(1, 0\)"),
    ],
)
def test_ids_that_are_no_tokens(ids: list[list[int]], message: str) -> None:
    runner = PackedRunner(packed_of(build(DENSE), "q8", "q8"), 1, 20)
    with pytest.raises(TenfoldError, match=message):
        runner.forward(torch.tensor(ids, dtype=torch.long))


def test_there_is_no_room_beyond_the_capacity() -> None:
    runner = PackedRunner(packed_of(build(DENSE), "q8", "q8"), 1, 20)
    with pytest.raises(TenfoldError, match="65 positions are more than the 64"):
        runner.forward(torch.zeros(1, 65, dtype=torch.long))


def test_expert_choice_is_refused() -> None:
    model = packed_of(build(SHAPE | {"router": "expert_choice"}), "q8", "q8")
    with pytest.raises(TenfoldError, match="expert_choice cannot generate"):
        PackedRunner(model, 1, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model of a text tokenizer, saved and packed: `model` and `packed`."""
    root = tmp_path_factory.mktemp("packed")
    tokenizer = Tokenizer(train_bpe(iter(TEXTS * 5 + ["the cat sat on the mat"] * 9), 300))
    model = build(SHAPE | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id})
    save_model(model, root / "model", tokenizer)
    pack(root / "model", root / "packed", Packing(experts="q8", rest="bf16"))
    return root


def test_generate_runs_the_packed_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model_and_tokenizer(folder / "packed")
    assert isinstance(model, PackedModel)
    greedy = SamplingParams(max_tokens=20, temperature=0)
    generation = Generation(model, tokenizer, "the cat sat", greedy).finish()
    arguments = ["--prompt", "the cat sat", "--max-tokens", 20, "--temperature", 0, "--json"]
    status, out, _ = run(capsys, "generate", folder / "packed", *arguments)
    assert status == 0 and json.loads(out)["tokens"] == generation.tokens
    # As torch says from the same, dequantised weights: of the first token the two are sure.
    torch_model = load_model(folder / "packed")
    assert (
        generation.tokens[0] == Generation(torch_model, tokenizer, "the cat sat", greedy).finish().tokens[0]
    )


def test_without_kernels_the_same_command_runs_through_torch(folder: Path) -> None:
    code = (
        "import sys; sys.modules['tenfold._native'] = None\n"
        "from tenfold.cli import main; sys.argv[0] = 'tenfold'; main()"
    )
    arguments = ["generate", str(folder / "packed"), "--prompt", "the cat", "--max-tokens", "3", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["finish_reason"] in ("length", "stop")


def test_torchs_threads_are_the_callers_between_tokens(folder: Path) -> None:
    """Also of two generations at once, which do not end in the order in which they began."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        model, _ = load_model_and_tokenizer(folder / "packed")
        assert isinstance(model, PackedModel)
        first, second = (generate_tokens(model, [1], SamplingParams(max_tokens=2, seed=0)) for _ in range(2))
        for generation in (first, second, first, second):
            next(generation, None)
            assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


BESIDE_A_PROMPT = """
import os, signal, threading, torch
from test_packed_engine import DENSE, PackedRunner, build, packed_of

model = packed_of(build(DENSE | {"num_hidden_layers": 8}), "q8", "q8")
ids = torch.zeros(1, 500, dtype=torch.long)
prompts = [PackedRunner(model, 1, 500) for _ in range(2)]
stop = False

def run(runner):
    runner.reset()
    runner.forward(ids)

def work():
    while not stop:
        run(prompts[0])

thread = threading.Thread(target=work)
thread.start()
for _ in range(10):
    if os.fork() == 0:
        os._exit(0)
    os.wait()
stop = True
thread.join()

handled = []
signal.signal(signal.SIGALRM, lambda *_: handled.append(run(prompts[0])))
while len(handled) < 5:
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    run(prompts[1])
"""


def test_forks_and_signals_while_a_prompt_is_read() -> None:
    """Neither the one nor a handler that uses the kernels waits for what waits for it."""
    command = [sys.executable, "-c", BESIDE_A_PROMPT]
    assert subprocess.run(command, timeout=60, cwd=Path(__file__).parent).returncode == 0


LOST = """
import os, sys
from tenfold.engine.generation import Generation, load_generation
from tenfold.sampling import SamplingParams
generation = load_generation(sys.argv[1], "the cat", SamplingParams(max_tokens=1))
generation.finish()
os.truncate(sys.argv[2], 4096)
Generation(generation.model, generation.tokenizer, "a", generation.params).finish()
"""


def test_a_file_that_is_cut_short_while_in_use_ends_in_one_line(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder / "packed", tmp_path / "packed"))
    largest = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    ran = subprocess.run([sys.executable, "-c", LOST, path, largest], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "cut short while it was in use" in ran.stderr


def test_a_process_that_handles_lost_files_itself_may(folder: Path) -> None:
    code = (
        "import faulthandler, sys; from tenfold.packed import load_packed; faulthandler.enable()\n"
        "load_packed(sys.argv[1]); import os, signal; os.kill(os.getpid(), signal.SIGBUS)"
    )
    ran = subprocess.run([sys.executable, "-c", code, folder / "packed"], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGBUS and "Fatal Python error" in ran.stderr
