"""The safetensors reader against the library: same tensors from valid files, an error from all others."""

import json
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from tenfold.checkpoint.safetensors import READ_DTYPES, list_file
from tenfold.errors import TenfoldError

fuzz = settings(
    max_examples=300,
    deadline=5000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SHARED_DTYPES = [name for name in READ_DTYPES if name != "F8_E8M0"]  # the library has no name for it in torch
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def read_all(path: Path) -> dict[str, Tensor]:
    return {name: raw.read(0, raw.shape[0] if raw.shape else 1) for name, raw in list_file(path).items()}


def check_against_library(path: Path, contents: bytes) -> bool:
    """Whether we read the file; then the library must read the same from it."""
    path.write_bytes(contents)
    try:
        ours = read_all(path)
    except TenfoldError as error:
        assert str(error).startswith(f"{path}: not a whole safetensors file: ")
        assert str(error).isprintable() and len(str(error)) < 2000
        return False
    theirs = load(contents)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert torch.equal(bits(tensor), bits(theirs[name]))
    return True


shapes = st.lists(st.integers(0, 4), max_size=4)
names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=12)


@st.composite
def whole_files(draw: st.DrawFn) -> bytes:
    """Of every dtype the library gives to torch, tensors in any order of the header."""
    wanted = st.tuples(st.sampled_from(SHARED_DTYPES), shapes)
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in draw(st.dictionaries(names, wanted, max_size=4)).items():
        end = at + torch.empty(shape, dtype=READ_DTYPES[dtype]).nbytes
        header[name] = entry(dtype, shape, [at, end])
        at = end
    header = dict(draw(st.permutations(list(header.items()))))
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode() + b" " * draw(st.integers(0, 8))
    return file_bytes(text, bytes(i * 7 % 256 for i in range(at)))


@fuzz
@given(contents=whole_files())
def test_every_whole_file_is_read_as_the_library_reads_it(tmp_path: Path, contents: bytes) -> None:
    assert check_against_library(tmp_path / "f", contents)


@fuzz
@given(contents=st.binary(max_size=64))
def test_random_bytes(tmp_path: Path, contents: bytes) -> None:
    check_against_library(tmp_path / "f", contents)


TOKENS = b'{}[]",:0123456789-.eE \\\n\x00\xff' + b"FBIU"


@fuzz
@given(contents=whole_files(), data=st.data())
def test_mutated_files(tmp_path: Path, contents: bytes, data: st.DataObject) -> None:
    """Bytes of the length and the header flipped, dropped, put in, and the file cut short."""
    for _ in range(data.draw(st.integers(1, 3))):
        length = min(len(contents), 8 + int.from_bytes(contents[:8], "little"))
        at = data.draw(st.integers(0, length))
        put = bytes(data.draw(st.lists(st.sampled_from(TOKENS), max_size=3)))
        gone = data.draw(st.integers(0, 3))
        contents = contents[:at] + put + contents[at + gone :]
        if data.draw(st.booleans()) and at >= 8:  # keep the length right, so that the header is met
            contents = (length - 8 + len(put) - gone).to_bytes(8, "little", signed=True) + contents[8:]
    check_against_library(tmp_path / "f", contents)


sizes = st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.0, True, None])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*SHARED_DTYPES, "F4", "F6_E2M3", "f32", ""]) | json_values,
        "shape": st.lists(sizes, max_size=4) | json_values,
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | json_values,
    },
    optional={"strides": json_values},
)
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | names, entries | json_values, max_size=3
)


@fuzz
@given(header=headers, data=st.binary(max_size=24))
def test_random_headers(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    check_against_library(tmp_path / "f", file_bytes(header, data))


BAD = {
    "empty": (b"", "0 bytes, fewer than its header takes"),
    "no length": (b"\x02\0\0", "3 bytes, fewer"),
    "length past the end": ((9).to_bytes(8, "little") + b"{}", "10 bytes, fewer"),
    "length past any end": (b"\xff" * 8 + b"{}", "10 bytes, fewer"),
    "no header": (file_bytes(b""), "does not begin with {"),
    "space before the header": (file_bytes(b" {}"), "does not begin with {"),
    "list": (file_bytes([]), "does not begin with {"),
    "two objects": (file_bytes(b"{}{}"), "not JSON"),
    "no utf-8": (file_bytes(b'{"\xff": 1}'), "not JSON"),
    "deep": (file_bytes(b'{"a":' + b"[" * 100_000), "not JSON"),
    "NaN": (file_bytes({"a": entry(shape=[float("nan")])}), "NaN is no size"),
    "fraction": (file_bytes({"a": entry(shape=[2.0])}), r"2\.0 is no size"),
    "minus zero": (file_bytes(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "-0 is no size"),
    "negative": (file_bytes({"a": entry(shape=[-2])}), "-2 is no size"),
    "digits without end": (file_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "9999 is no size"),
    "name twice": (
        file_bytes(b"{%b,%b}" % ((b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}',) * 2)),
        "a name is there twice",
    ),
    "field twice": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        "a name is there twice",
    ),
    "half a character": (file_bytes(rb'{"\ud800":1}'), "name does not print"),
    "line feed in a name": (file_bytes({"a\nb": entry()}, bytes(8)), "name does not print"),
    "endless name": (file_bytes({"a" * 5000: entry()}, bytes(8)), "name does not print or is too long"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__ .* nothing but texts"),
    "no entry": (file_bytes({"a": 1}), "tensor a must have dtype, shape and data_offsets"),
    "field missing": (file_bytes({"a": {"dtype": "F32", "shape": [2]}}), "tensor a must have dtype"),
    "field unknown": (file_bytes({"a": {**entry(), "x": 1}}, bytes(8)), "tensor a must have .* no more"),
    "dtype unknown": (file_bytes({"a": entry("F4")}, bytes(8)), "tensor a has dtype 'F4', not F32, BF16"),
    "dtype of no kind": (file_bytes({"a": entry(["F32"])}, bytes(8)), "has dtype .'F32'., not F32"),
    "shape of bools": (file_bytes({"a": entry("U8", [True], [0, 1])}, b"0"), "shape of tensor a must be"),
    "shape of texts": (file_bytes({"a": entry(shape=["2"])}, bytes(8)), "shape of tensor a must be"),
    "axes without end": (
        file_bytes({"a": entry("U8", [1] * 65, [0, 1])}, b"0"),
        "shape of tensor a .* at most 64",
    ),
    "three offsets": (file_bytes({"a": entry(data_offsets=[0, 8, 8])}, bytes(8)), "must be two"),
    "backwards": (file_bytes({"a": entry("U8", [0], [1, 0])}, b"0"), "has -1 bytes"),
    "shape too small": (file_bytes({"a": entry(shape=[1])}, bytes(8)), r"shape \(1,\) and dtype F32 has 8"),
    "overflow": (file_bytes({"a": entry("U8", [2**32, 2**32], [0, 0])}), "larger than any"),
    "overflow hidden by a zero": (
        file_bytes({"a": entry("U8", [2**40, 2**40, 0], [0, 0])}),
        "larger than any",
    ),
    "hole": (
        file_bytes({"a": entry("U8", [1], [0, 1]), "b": entry("U8", [1], [2, 3])}, bytes(3)),
        "tensor b leaves a hole before it",
    ),
    "hole at the start": (file_bytes({"a": entry("U8", [1], [1, 2])}, bytes(2)), "tensor a leaves a hole"),
    "overlap": (
        file_bytes({"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [1, 3])}, bytes(3)),
        "tensor b overlaps the tensor before it",
    ),
    "same bytes twice": (
        file_bytes({"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [0, 2])}, bytes(2)),
        "tensor b overlaps",
    ),
    "bytes left over": (file_bytes({"a": entry()}, bytes(9)), "take 8 bytes, and 9 are there"),
    "cut short": (file_bytes({"a": entry()}, bytes(7)), "take 8 bytes, and 7 are there"),
    "past the end": (file_bytes({"a": entry("U8", [10**15], [0, 10**15])}), "bytes, and 0 are there"),
}


@pytest.mark.parametrize(("contents", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(contents)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(TenfoldError, match=f"not a whole safetensors file: .*{message}"):
        list_file(path)
    assert time.perf_counter() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert not check_against_library(path, contents)


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:  # a hole in a file takes no room on the disk
        file.write((25_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    tracemalloc.start()
    with pytest.raises(TenfoldError, match="header is of 25,000,001 bytes, more than 25,000,000"):
        list_file(tmp_path / "f")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_file_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    save_file({"a": torch.ones(100)}, path)
    raw = list_file(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(raw.read(0, 99), torch.ones(99))
    with pytest.raises(TenfoldError, match="ends before its tensors do"):
        raw.read(0, 100)
    path.unlink()
    with pytest.raises(TenfoldError, match=f"{path}: cannot read it: No such file"):
        raw.read(0, 1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_read_alone_and_into_memory_of_their_own(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 3, 5).to(dtype)
    save_file({"before": torch.ones(3, dtype=torch.uint8), "a": tensor}, tmp_path / "f")
    raw = list_file(tmp_path / "f")["a"]
    for start, stop in [(0, 7), (2, 3), (3, 6), (4, 4), (6, 7)]:
        assert torch.equal(raw.read(start, stop), tensor[start:stop])
    raw.read(0, 7).zero_()
    assert torch.equal(raw.read(0, 7), tensor)


STRICTER = {
    "space before the header",
    "name twice",
    "line feed in a name",
    "endless name",
    "field unknown",
    "axes without end",
}
"""Of the above, what the library accepts."""


@pytest.mark.parametrize(("name", "contents"), [(name, contents) for name, (contents, _) in BAD.items()])
def test_the_library_agrees_that_they_are_bad(name: str, contents: bytes) -> None:
    with nullcontext() if name in STRICTER else pytest.raises(SafetensorError):
        load(contents)
