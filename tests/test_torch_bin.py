"""pytorch_model.bin: read like safetensors, never run, and only where there are no safetensors."""

import json
import pickle
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tenfold.checkpoint import load_model, save_model
from tenfold.checkpoint.torch_bin import list_file
from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError
from tenfold.model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=31, hidden_size=12, intermediate_size=10, num_hidden_layers=2, head_dim=6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory as transformers wrote it before safetensors."""
    save_model(Transformer(CONFIG).init_weights(0), tmp_path / "m")
    torch.save(load_file(tmp_path / "m" / "model.safetensors"), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    return tmp_path / "m"


def assert_first_model(directory: Path) -> None:
    wanted = Transformer(CONFIG).init_weights(0).state_dict()
    for name, tensor in load_model(directory).state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_one_file(saved: Path) -> None:
    assert_first_model(saved)


def test_shards(saved: Path) -> None:
    tensors = torch.load(saved / "pytorch_model.bin")
    (saved / "pytorch_model.bin").unlink()
    files = {name: f"pytorch_model-0000{i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({n: t for n, t in tensors.items() if files[n] == file}, saved / file)
    index = saved / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert_first_model(saved)
    index.write_text(json.dumps({"weight_map": {**files, "more": "pytorch_model-00001-of-00002.bin"}}))
    with pytest.raises(
        TenfoldError, match=r"00001-of-00002.bin: tensor more is missing, though pytorch_model"
    ):
        load_model(saved)


def test_safetensors_win(saved: Path) -> None:
    save_model(Transformer(CONFIG).init_weights(1), saved.parent / "other")
    (saved.parent / "other" / "model.safetensors").rename(saved / "model.safetensors")
    model = load_model(saved)
    assert torch.equal(
        model.embed_tokens.weight, Transformer(CONFIG).init_weights(1).state_dict()["embed_tokens.weight"]
    )


def test_views_and_parameters(tmp_path: Path) -> None:
    shared = torch.arange(24.0).view(4, 6)
    torch.save({"a": shared.T, "b": torch.nn.Parameter(shared[1:3]), "c": torch.tensor(2.0)}, tmp_path / "f")
    tensors = list_file(tmp_path / "f")
    assert torch.equal(tensors["a"].read(2, 5), shared.T[2:5])
    assert torch.equal(tensors["b"].read(0, 2), shared[1:3]) and not tensors["b"].read(0, 2).requires_grad
    assert tensors["c"].read(0, 1) == 2 and tensors["c"].shape == ()


class Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_code_in_a_file_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    for write in (torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))):
        write({"a": Runs()}, saved / "pytorch_model.bin")
        with pytest.raises(TenfoldError, match=r"pytorch_model.bin: .*; convert it to safetensors where you"):
            load_model(saved)
    assert not (saved / "ran").exists()


BAD = {
    "run": ({"a": Runs()}, "by running code from it"),
    "list": ([torch.ones(1)], "it holds a list, not tensors by name"),
    "nested": ({"model": {"a": torch.ones(1)}}, "model in it is no plain tensor"),
    "number": ({"epoch": 3}, "epoch in it is no plain tensor"),
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, "a in it is no plain tensor"),
    "no data": ({"a": torch.ones(2, device="meta")}, "a in it is no plain tensor"),
    "names": ({1: torch.ones(1)}, "a tensor's name is 1"),
    "line feed": ({"a\n": torch.ones(1)}, "a tensor's name is 'a"),
}


@pytest.mark.parametrize(("contents", "message"), BAD.values(), ids=BAD)
def test_bad_contents(tmp_path: Path, contents: Any, message: str) -> None:
    torch.save(contents, tmp_path / "f")
    with pytest.raises(TenfoldError, match=f"{tmp_path / 'f'}: .*{message}"):
        list_file(tmp_path / "f")


def test_a_file_from_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "f", _use_new_zipfile_serialization=False)
    with pytest.raises(TenfoldError, match=r"torch cannot read it .*; convert it to safetensors"):
        list_file(tmp_path / "f")


def mutated(data: st.DataObject, contents: bytes) -> bytes:
    for _ in range(data.draw(st.integers(1, 4))):
        at, gone = data.draw(st.integers(0, len(contents))), data.draw(st.integers(0, 2))
        contents = contents[:at] + data.draw(st.binary(max_size=2)) + contents[at + gone :]
    return contents


@pytest.mark.filterwarnings("ignore")  # torch warns of pickle protocols and storages it has never seen
@settings(
    max_examples=300,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), pickle_alone=st.booleans())
def test_mutated_files(tmp_path: Path, data: st.DataObject, pickle_alone: bool) -> None:
    """Bytes flipped, dropped and put in, anywhere or in the pickle of an archive that is whole."""
    path = tmp_path / "f"
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, path)
    if pickle_alone:
        with ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with ZipFile(path, "w") as archive:
            for name, contents in members.items():
                archive.writestr(name, mutated(data, contents) if name.endswith(".pkl") else contents)
    else:
        path.write_bytes(mutated(data, path.read_bytes()))
    try:
        for raw in list_file(path).values():
            raw.read(0, min(raw.shape[0], 100) if raw.shape else 1)
    except TenfoldError as error:
        assert str(error).isprintable()
