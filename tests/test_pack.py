"""Packed models on disk: every family there and back, in place and checked, and every way it can go wrong."""

import errno
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import expressible, write_model
from random_families import FAMILIES, random_fields
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import word_tokenizer
from test_cli import run
from test_parity_transformers import build, ids, load_hf
from test_switch import build as build_switch
from torch import Tensor

from tenfold.checkpoint import load_config, load_model, save_model
from tenfold.checkpoint.pack import shard
from tenfold.checkpoint.pack.calibrate import ENOUGH, importance
from tenfold.checkpoint.pack.folder import growing_folder
from tenfold.checkpoint.pack.packing import pack
from tenfold.checkpoint.pack.unpack import unpack
from tenfold.checkpoint.pack.verify import verify
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.formats import Packing
from tenfold.inspection import inspect
from tenfold.model.transformer import Transformer
from tenfold.packed import PackedExperts, PackedMatrix, PackedModel, load_packed, packed_of
from tenfold.panels import matrix_bytes, unpack_matrix

BF16 = Packing(experts="bf16", rest="bf16")
SMALL = {
    "model_type": "qwen2_moe",
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "qk_norm": "none",
    "attention_bias": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 19,
    "shared_expert_intermediate_size": 12,
    "shared_expert_gate": True,
    "mlp_only_layers": (1,),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model(build(SMALL), tmp_path / "m", word_tokenizer(), torch.bfloat16)
    return tmp_path / "m"


@pytest.fixture
def packed(source: Path) -> Path:
    out = source.with_name("packed")
    pack(source, out, Packing())
    return out


def assert_same(left: PackedModel, right: PackedModel) -> None:
    assert left.config == right.config
    assert left.weights.keys() == right.weights.keys()
    for name, ours in left.weights.items():
        theirs = right.weights[name]
        if isinstance(ours, Tensor):
            assert isinstance(theirs, Tensor) and torch.equal(ours.float(), theirs.float()), name
        else:
            assert type(ours) is type(theirs)
            left_fields, right_fields = vars(ours), vars(theirs)
            bytes_of = "panels" if isinstance(ours, PackedMatrix) else "records"
            assert torch.equal(left_fields[bytes_of], right_fields[bytes_of]), name
            assert {**left_fields, bytes_of: 0} == {**right_fields, bytes_of: 0}


def edit_json(path: Path, edit: Any) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_there_and_back_is_exact(family: str, seed: int, tmp_path: Path) -> None:
    """Of every family, whatever its files' names and layouts; the predictor alone is left out."""
    save_model(build(random_fields(family, seed)), tmp_path / "m", dtype=torch.bfloat16)
    summary = pack(tmp_path / "m", tmp_path / "packed", BF16)
    wanted, back = load_model(tmp_path / "m"), load_model(tmp_path / "packed")
    left_out = wanted.state_dict().keys() - back.state_dict().keys()
    assert left_out == {name for name in wanted.state_dict() if name.startswith("mtp.")}
    assert summary["left_out_mtp_params"] == load_config(tmp_path / "m").mtp_params()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name
    assert isinstance(wanted, Transformer)
    assert_same(load_packed(tmp_path / "packed"), packed_of(wanted, "bf16", "bf16"))


@pytest.mark.parametrize(("experts", "rest"), [("q4", "q8"), ("q8", "q4"), ("mxfp4", "bf16")])
def test_files_memory_and_decoding_agree(source: Path, experts: Any, rest: Any) -> None:
    """What is mapped is what packing in memory gives, and what the plain reader decodes."""
    out = source.with_name("packed")
    pack(source, out, Packing(experts=experts, rest=rest))
    model, mapped, decoded = load_model(source), load_packed(out), load_model(out).state_dict()
    assert isinstance(model, Transformer)
    assert_same(mapped, packed_of(model, experts, rest))
    for name, weight in mapped.weights.items():
        if isinstance(weight, PackedMatrix):
            assert weight.format == rest
            whole = unpack_matrix(weight.panels, weight.format, weight.rows, weight.columns)
            assert torch.equal(decoded[name], whole), name
        elif isinstance(weight, PackedExperts):
            assert weight.format == experts
            check_records(weight, decoded[f"{name}.gate_up"], decoded[f"{name}.down"])
        else:
            assert torch.equal(decoded[name], weight.float())
    error = max(float((decoded[name] - tensor).abs().max()) for name, tensor in model.state_dict().items())
    assert 0 < error < 0.5


def check_records(experts: PackedExperts, gate_up_E2FD: Tensor, down_EDF: Tensor) -> None:
    """Against the layout in words: gate's panel, up's panel, and so on, then down's."""
    D, F, form = experts.hidden_size, experts.width, experts.format
    panel = matrix_bytes(form, 16, D)
    for expert, record in enumerate(experts.records):
        for start in range(0, F, 16):
            stop = min(start + 16, F)
            for half in range(2):
                at = (start // 16 * 2 + half) * panel
                rows = unpack_matrix(record[at : at + panel], form, stop - start, D)
                assert torch.equal(rows, gate_up_E2FD[expert, half * F + start : half * F + stop])
        at = -(-F // 16) * 2 * panel
        down = record[at : at + matrix_bytes(form, D, F)]
        assert torch.equal(unpack_matrix(down, form, D, F), down_EDF[expert])
        assert not record[at + len(down) :].any()


def test_records_are_aligned_and_in_order(packed: Path) -> None:
    index = json.loads((packed / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 4  # a file a layer, and one for the rest
    for file in packed.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        notes = header.pop("__metadata__")
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == header.keys()
        for name, entry in header.items():
            begin, end = (start + at for at in entry["data_offsets"])
            assert notes[name].endswith(f" {zlib.crc32(data[begin:end]):08x}")
            if entry["dtype"] == "U8":
                assert begin % 4096 == end % 4096 == 0
    experts = load_packed(packed).weights["layers.2.mlp.experts"]
    assert isinstance(experts, PackedExperts)
    assert experts.records.data_ptr() % 4096 == 0 and experts.records.is_contiguous()


def test_plain_tensors_keep_the_precision_of_the_source(source: Path, tmp_path: Path) -> None:
    save_model(load_model(source), tmp_path / "wide")
    pack(tmp_path / "wide", tmp_path / "p32", Packing())
    pack(source, tmp_path / "p16", Packing())
    for folder, dtype in (("p32", torch.float32), ("p16", torch.bfloat16)):
        plain = [w for w in load_packed(tmp_path / folder).weights.values() if isinstance(w, Tensor)]
        assert plain and {tensor.dtype for tensor in plain} == {dtype}


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_packed_only_if_it_is_one(tmp_path: Path, tied: bool) -> None:
    save_model(build({**SMALL, "tie_word_embeddings": tied}), tmp_path / "m")
    pack(tmp_path / "m", tmp_path / "packed", Packing())
    assert ("lm_head.weight" in load_packed(tmp_path / "packed").weights) != tied
    back = load_model(tmp_path / "packed")
    assert isinstance(back, Transformer)
    assert (back.lm_head.weight is back.embed_tokens.weight) == tied


def test_gpt_oss_keeps_its_own_bits(tmp_path: Path) -> None:
    """Its MXFP4 blocks and scales, through floating point, to the same numbers."""
    fields = {**random_fields("gpt_oss", 3), "hidden_size": 64, "moe_intermediate_size": 32}
    save_model(build(fields), tmp_path / "m", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 126, shape[:3], generator=generator, dtype=torch.uint8)
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    pack(tmp_path / "m", tmp_path / "packed", Packing(experts="mxfp4", rest="bf16"))
    wanted, back = load_model(tmp_path / "m").state_dict(), load_model(tmp_path / "packed").state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, back[name]), name


def test_the_command_line_packs_inspects_and_unpacks(
    capsys: pytest.CaptureFixture[str], source: Path
) -> None:
    out, plain = source.with_name("packed"), source.with_name("plain")
    status, text, err = run(capsys, "pack", source, "-o", out, "--rest", "bf16", "--json")
    summary = json.loads(text)
    assert status == 0 and "packing" in err
    assert (summary["experts"], summary["rest"], summary["files"]) == ("q4", "bf16", 4)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "tenfold",
        "format_version": 1,
        "experts": "q4",
        "rest": "bf16",
    }
    status, text, _ = run(capsys, "inspect", out, "--verify", "--json")
    found = json.loads(text)
    assert status == 0 and found["verified"]["bytes"] == summary["weight_bytes"]
    assert set(found["stored"]["tensor_bytes"]) == {"q4", "bf16", "bfloat16"}
    assert sum(found["stored"]["tensor_bytes"].values()) == summary["weight_bytes"]
    status, text, _ = run(capsys, "unpack", out, "-o", plain, "--dtype", "float32", "--json")
    assert status == 0 and json.loads(text)["architecture"] == "Qwen2MoeForCausalLM"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (plain / name).read_bytes() == (source / name).read_bytes()
    with torch.no_grad():
        wanted = load_model(out)(ids())
        torch.testing.assert_close(load_hf(plain)(ids()).logits, wanted, atol=1e-4, rtol=1e-4)


def test_unpacking_is_for_packed_models(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(gguf := source.with_name("m.gguf"), build(expressible("mixtral", 0)), False, False)
    out = ("-o", source.with_name("x"))
    verbs = (("unpack", source, *out), ("unpack", gguf, *out), ("inspect", source, "--verify"))
    for verb in (*verbs, ("inspect", gguf, "--verify")):
        status, _, err = run(capsys, *verb)
        assert status == 2 and "is no packed model" in err
    assert not source.with_name("x").exists()


def test_a_folder_that_is_there_is_kept(source: Path, packed: Path) -> None:
    before = (packed / "config.json").read_bytes()
    with pytest.raises(TenfoldError, match="packed is there already and is not an empty directory"):
        pack(source, packed, Packing())
    assert (packed / "config.json").read_bytes() == before
    assert sorted(path.name for path in packed.parent.iterdir()) == ["m", "packed"]


def test_a_place_that_cannot_be_written(source: Path) -> None:
    file = source.with_name("file")
    file.write_text("")
    for out in (file / "packed", Path("/proc/none/packed")):
        with pytest.raises(TenfoldError, match="packed: cannot be written"):
            pack(source, out, Packing())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    ["embed_tokens.weight", "layers.2.mlp.experts.3.up_proj.weight", "layers.0.self_attn.q_proj.bias"],
)
def test_numbers_that_are_none_are_refused(source: Path, name: str, bad: float) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.{name}"].view(-1)[-1] = bad
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TenfoldError, match=f"model.safetensors: tensor model.{name} holds NaN, infinity"):
        pack(source, source.with_name("packed"), Packing())
    assert not source.with_name("packed").exists()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    save_model(build_switch(), tmp_path / "m")
    with pytest.raises(TenfoldError, match="is an encoder-decoder"):
        pack(tmp_path / "m", tmp_path / "packed", Packing())


def stop_at_write(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the writing of that piece of a tensor fail."""
    make, count = shard._padded, [0]

    def failing(entry: shard.Entry) -> Iterator[memoryview]:
        for chunk in make(entry):
            count[0] += 1
            if count[0] == number:
                raise error
            yield chunk

    monkeypatch.setattr(shard, "_padded", failing)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (FULL, TenfoldError, "cannot be written .No space left on device.; what is done is kept in"),
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted; what is done is kept in"),
    ],
)
def test_interrupted_and_resumed(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: Any, message: str
) -> None:
    """The same bytes as in one go, of which the whole files are not written again."""
    out, reference = source.with_name("packed"), source.with_name("reference")
    pack(source, reference, Packing())
    with monkeypatch.context() as patch:
        stop_at_write(patch, 20, error)
        with pytest.raises(raised, match=message):
            pack(source, out, Packing())
    assert not out.exists()
    (folder,) = source.parent.glob(".packed.packing")
    assert not list(folder.glob("*.part"))
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert 0 < len(done) < 4
    summary = pack(source, out, Packing())
    assert summary["files_from_before"] == len(done)
    assert {path: (out / path.name).stat().st_mtime_ns for path in done} == done
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in reference.iterdir())
    for path in reference.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert not list(source.parent.glob(".*"))


def test_ctrl_c_says_how_to_go_on(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at_write(monkeypatch, 20, KeyboardInterrupt())
    status, out, err = run(capsys, "pack", source, "-o", source.with_name("packed"), "--json")
    assert status == 130 and out == ""
    assert err.splitlines()[-1].startswith("tenfold: interrupted; what is done is kept in")


def test_nothing_is_left_where_nothing_was_done(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_write(monkeypatch, 1, FULL)
    with pytest.raises(TenfoldError, match=r"cannot be written \(No space left on device\)$"):
        pack(source, source.with_name("packed"), Packing())
    assert [path.name for path in source.parent.iterdir()] == ["m"]


@pytest.mark.parametrize("stray", ["model-00001-of-00004.safetensors", "model-00001-of-00007.part"])
def test_remains_that_nothing_can_go_on_with_are_cleared(source: Path, stray: str) -> None:
    """Whole files without a record of what they are; a record of something else without a whole file."""
    folder = source.with_name(".packed.packing")
    folder.mkdir()
    (folder / stray).write_bytes(b"junk")
    if stray.endswith(".part"):
        (folder / "packing.json").write_text('{"experts": "q8"}')
    assert pack(source, source.with_name("packed"), Packing())["files_from_before"] == 0
    load_packed(source.with_name("packed"))
    assert not list(source.parent.glob("packed/*.part"))


KILLED = """
import os, signal, sys
from pathlib import Path
from tenfold.checkpoint.pack import shard
from tenfold.checkpoint.pack.packing import pack
from tenfold.formats import Packing
make, count = shard._padded, [0]
def killing(entry):
    for chunk in make(entry):
        count[0] += 1
        if count[0] == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield chunk
shard._padded = killing
pack(sys.argv[1], Path(sys.argv[2]), Packing())
"""


def test_killed_and_resumed(source: Path) -> None:
    out = source.with_name("packed")
    ran = subprocess.run([sys.executable, "-c", KILLED, source, out], capture_output=True)
    assert ran.returncode == -signal.SIGKILL
    assert not out.exists() and list(source.parent.glob(".packed.packing/*.part"))
    assert pack(source, out, Packing())["files_from_before"] > 0
    verify(out)
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("what", ["experts", "source"])
def test_an_unfinished_pack_of_something_else(
    source: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with monkeypatch.context() as patch:
        stop_at_write(patch, 20, FULL)
        with pytest.raises(TenfoldError):
            pack(source, source.with_name("packed"), Packing())
    packing, message = Packing(), "with source_files {'model.safetensors'"
    if what == "experts":
        packing, message = Packing(experts="q8"), "with experts q4, not q8"
    else:
        os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(TenfoldError, match=f".packed.packing holds an unfinished pack {message}"):
        pack(source, source.with_name("packed"), packing)
    assert list(source.parent.glob(".packed.packing/*.safetensors"))


def shard_of(directory: Path, tensor: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("layers.2.mlp.experts.3", "layer 2, expert 3 is damaged"),
        ("layers.1.mlp.down.weight", "tensor layers.1.mlp.down.weight is damaged"),
        ("norm.weight", "tensor norm.weight is damaged"),
    ],
)
def test_a_changed_byte_is_found_and_named(packed: Path, tensor: str, message: str) -> None:
    verify(packed)
    path = shard_of(packed, tensor)
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[tensor]["data_offsets"]
    data[start + (begin + end) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(TenfoldError, match=f"{path.name}: {message}"):
        inspect(str(packed), 10, verify=True)


def rewrite(directory: Path) -> None:
    """As another program would: neither aligned, nor with what the metadata say."""
    path = shard_of(directory, "layers.2.mlp.experts.3")
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    save_file(load_file(path), path, metadata=notes)


def drop_notes(directory: Path) -> None:
    path = shard_of(directory, "layers.2.mlp.experts.3")
    save_file(load_file(path), path)


def truncate(directory: Path) -> None:
    path = shard_of(directory, "layers.2.mlp.experts.3")
    os.truncate(path, path.stat().st_size - 4096)


def config_field(**fields: Any) -> Any:
    return lambda directory: edit_json(directory / "config.json", lambda raw: raw.update(fields))


def packing_field(**fields: Any) -> Any:
    return lambda directory: edit_json(
        directory / "config.json", lambda raw: raw["quantization_config"].update(fields)
    )


BAD = {
    "truncated": (truncate, "not a whole safetensors file: its tensors take"),
    "not aligned": (rewrite, "begins at byte .*, no multiple of 4,096|does not follow the expert before it"),
    "no notes": (drop_notes, "does not say how it is packed, not as"),
    "shard gone": (lambda d: shard_of(d, "layers.1.mlp.down.weight").unlink(), "which is not there"),
    "newer": (packing_field(format_version=2), "format_version is 2, and this tenfold reads only 1"),
    "version no number": (packing_field(format_version="1"), "format_version is '1', and this tenfold"),
    "unknown format": (packing_field(experts="q3"), "experts: Input should be 'bf16', 'q8', 'q4' or 'mxfp4'"),
    "other format": (packing_field(experts="q8"), "experts.0 is packed as q4 24x19, not as q8 24x19"),
    "no format": (
        lambda d: edit_json(d / "config.json", lambda raw: raw["quantization_config"].pop("rest")),
        "quantization_config lacks field rest",
    ),
    "vocabulary": (config_field(vocab_size=65), "embed_tokens.weight is packed as q8 67x24, not as q8 65x24"),
    "width": (config_field(moe_intermediate_size=20), "is packed as q4 24x19, not as q4 24x20"),
    "more experts": (config_field(num_experts=6), "router.weight is packed as plain 5x24, not as plain 6"),
    "fewer experts": (
        config_field(num_experts=4),
        "router.weight is packed as plain 5x24, not as plain 4",
    ),
    "more layers": (
        config_field(num_hidden_layers=4),
        "layers.3.input_layernorm.weight is missing, which",
    ),
    "fewer layers": (config_field(num_hidden_layers=2), "has no place in .*config.json"),
    "tied": (config_field(tie_word_embeddings=True), "tensor lm_head.weight has no place"),
}


@pytest.mark.parametrize(("harm", "message"), BAD.values(), ids=BAD)
def test_bad_packs(packed: Path, harm: Any, message: str) -> None:
    """Mapped or decoded, the same line."""
    harm(packed)
    for load in (load_packed, load_model, verify):
        with pytest.raises(TenfoldError, match=message) as caught:
            load(packed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "split"), [("mixtral", True), ("deepseek_v2", True), ("gpt_oss", False)])
def test_gguf_files_are_packed(family: str, split: bool, tmp_path: Path) -> None:
    """With permuted rows, heads that are split in two tensors, and experts in one."""
    write_model(tmp_path / "m.gguf", build(expressible(family, 0)), split_kv_b=split, fused_experts=False)
    pack(tmp_path / "m.gguf", tmp_path / "packed", BF16)
    back = load_model(tmp_path / "packed", torch.bfloat16).state_dict()
    for name, tensor in load_model(tmp_path / "m.gguf", torch.bfloat16).state_dict().items():
        assert torch.equal(tensor, back[name]), name


@torch.no_grad()
def test_importance_is_the_mean_squared_input() -> None:
    """Of one layer, worked out by hand; an expert with few tokens has the layer's."""
    model = build({**SMALL, "num_hidden_layers": 1, "mlp_only_layers": ()})
    tokens = ids(1, 60)[0]
    found = importance(model, tokens)
    seen: dict[str, Tensor] = {}
    layer = model.layers[0]
    layer.mlp.register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0].flatten(0, 1)))
    _, (aux,) = model(tokens[None], return_aux=True)
    attended = layer.input_layernorm(model.embed_tokens(tokens))
    close = torch.testing.assert_close
    close(found["layers.0.self_attn.q_proj.weight"], attended.square().mean(0))
    close(found["layers.0.mlp.shared_experts.gate_up.weight"], seen["x"].square().mean(0))
    chosen, x, experts = aux.expert_ids_TK, seen["x"], layer.mlp.experts
    _, weights, _ = layer.mlp.router(x[None])
    counts = [int((chosen == expert).sum()) for expert in range(5)]
    assert min(counts) < ENOUGH <= max(counts)
    of_layer = sum(x[(chosen == e).any(1)].square().sum(0) for e in range(5)) / sum(counts)
    for expert, count in enumerate(counts):
        token, slot = torch.where(chosen == expert)
        wanted = x[token].square().mean(0) if count >= ENOUGH else of_layer
        close(found["layers.0.mlp.experts.gate_up"][expert], wanted)
        if count >= ENOUGH:
            gate, up = (x[token] @ experts.gate_up[expert].T).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up * weights[token, slot, None]
            close(found["layers.0.mlp.experts.down"][expert], hidden.square().mean(0))


def test_calibration_rounds_with_care_what_the_text_uses(source: Path) -> None:
    text = words_in(source.with_name("text.txt"), 3000)
    pack(source, source.with_name("plain"), Packing(experts="q4", rest="q4"))
    pack(source, source.with_name("careful"), Packing(experts="q4", rest="q4"), text)
    model = load_model(source)
    assert isinstance(model, Transformer)
    weights = importance(model, torch.tensor(word_tokenizer().encode(text.read_text())[:4096]))
    wanted, errors = model.state_dict(), {}
    for name in ("plain", "careful"):
        back = load_model(source.with_name(name)).state_dict()
        squares = {n: (back[n] - wanted[n]).square() * w.unsqueeze(-2) for n, w in weights.items()}
        kinds = (".experts.gate_up", ".experts.down", ".weight")
        errors[name] = [sum(float(e.sum()) for n, e in squares.items() if n.endswith(kind)) for kind in kinds]
    for careful, plain in zip(errors["careful"], errors["plain"], strict=True):
        assert careful < 0.97 * plain, errors


def words_in(path: Path, count: int) -> Path:
    path.write_text(" ".join(f"w{number % 30 + 1}" for number in range(count)))
    return path


def test_columns_that_the_text_never_uses_are_rounded_as_well(tmp_path: Path) -> None:
    """A whole block of them, and a whole layer: what never counted is no excuse for any scale."""
    model = build({**SMALL, "hidden_size": 64, "head_dim": 16})
    with torch.no_grad():
        model.layers[0].input_layernorm.weight[:32] = 0
        model.layers[2].input_layernorm.weight[:] = 0
    save_model(model, tmp_path / "m", word_tokenizer())
    packing = Packing(experts="q4", rest="q4")
    pack(tmp_path / "m", tmp_path / "plain", packing)
    pack(tmp_path / "m", tmp_path / "careful", packing, words_in(tmp_path / "text.txt", 300))
    plain, careful = (load_model(tmp_path / name).state_dict() for name in ("plain", "careful"))
    for name, unused in (("layers.0.self_attn.q_proj.weight", 32), ("layers.2.self_attn.k_proj.weight", 64)):
        assert torch.equal(plain[name][:, :unused], careful[name][:, :unused])


def test_one_word_is_enough_to_calibrate_with(source: Path) -> None:
    pack(source, source.with_name("packed"), Packing(), words_in(source.with_name("text.txt"), 1))
    verify(source.with_name("packed"))


def test_a_model_that_overflows_is_not_calibrated(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = 1e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TenfoldError, match=r"q_proj.weight overflow, or are NaN, while the model reads"):
        pack(source, source.with_name("packed"), Packing(), words_in(source.with_name("text.txt"), 9))


def test_two_at_once_do_not_share_a_folder(source: Path) -> None:
    out, folder = source.with_name("packed"), source.with_name(".packed.packing")
    with growing_folder(out, {}):
        with pytest.raises(TenfoldError, match=r"\.packed\.packing is being filled by another"):
            pack(source, out, Packing())
        assert folder.exists() and not out.exists()


def test_what_needs_the_whole_model_says_what_memory_lacks(
    source: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenfold.memory.available_bytes", lambda: 0)
    text = words_in(source.with_name("text.txt"), 9)
    with pytest.raises(TenfoldError, match=r"of memory, .* are free: pack it without --calibrate"):
        pack(source, source.with_name("again"), Packing(), text)
    with pytest.raises(TenfoldError, match=r"packed in torch.bfloat16 needs .* are free: unpack it where"):
        unpack(packed, source.with_name("plain"), torch.bfloat16)


def test_weights_beyond_float16_are_not_unpacked_to_infinity(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    pack(source, source.with_name("packed"), Packing())
    with pytest.raises(TenfoldError, match=r"layers.1.mlp.down.weight holds numbers that torch.float16 does"):
        unpack(source.with_name("packed"), source.with_name("plain"), torch.float16)
    assert not source.with_name("plain").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "no text there"), (b"\xff\xfe\xff", "not UTF-8 text")],
)
def test_bad_calibration_text(source: Path, content: bytes | None, message: str) -> None:
    text = source.with_name("text.txt")
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(TenfoldError, match=f"text.txt: .*{message}"):
        pack(source, source.with_name("packed"), Packing(), text)


def test_stacked_experts_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a file holds them, no more than an expert or a piece of a matrix is asked for."""
    from tenfold.checkpoint import safetensors
    from tenfold.checkpoint.pack import source as reading

    fields = {**random_fields("granitemoe", 2), "num_experts": 8, "vocab_size": 4000}
    save_model(build(fields), tmp_path / "m")
    monkeypatch.setattr(reading, "PIECE_BYTES", 1 << 14)
    largest, reader = [0], safetensors._reader

    def counting(*arguments: Any) -> Any:
        read = reader(*arguments)

        def counted(start: int, stop: int) -> Tensor:
            out = read(start, stop)
            largest[0] = max(largest[0], out.nbytes)
            return out

        return counted

    monkeypatch.setattr(safetensors, "_reader", counting)
    pack(tmp_path / "m", tmp_path / "packed", Packing())
    config = load_config(tmp_path / "m")
    assert isinstance(config, ModelConfig)
    expert = 4 * 2 * config.moe_intermediate_size * config.hidden_size
    assert largest[0] <= max(1 << 14, expert)
