"""The GGUF container: what the gguf package writes is read, and nothing that is broken gets far."""

import os
import resource
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from gguf_files import expressible, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parity_transformers import build

from tenfold.checkpoint import load_model
from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.errors import TenfoldError

DECODABLE = [Kind.F32, Kind.F16, *gguf.quants._type_traits]
REFUSED = sorted(set(Kind) - set(DECODABLE))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def save(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_kind_of_metadata(file: Path) -> None:
    scalars = {
        Value.UINT8: 255, Value.INT8: -128, Value.UINT16: 65535, Value.INT16: -32768,
        Value.UINT32: 2**32 - 1, Value.INT32: -(2**31), Value.UINT64: 2**64 - 1, Value.INT64: -(2**63),
        Value.FLOAT32: 0.375, Value.FLOAT64: 0.1, Value.BOOL: True, Value.STRING: "naïve 🦙\n",
    }  # fmt: skip
    writer, wanted = gguf.GGUFWriter(file, "llama"), {"general.architecture": "llama"}
    for kind, value in scalars.items():
        wanted |= {f"one.{kind.name}": value, f"many.{kind.name}": [value, value, value]}
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, Value.ARRAY, sub_type=kind)
    save(writer)
    metadata = open_gguf(file).metadata
    assert metadata == wanted
    assert {key: type(value) for key, value in metadata.items()} == {k: type(v) for k, v in wanted.items()}


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda kind: kind.name)
def test_every_quantisation_that_the_package_decodes(kind: Kind, file: Path) -> None:
    """Random bytes, any rows of them; a vector too, whose rows are single weights."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng, writer, wanted = np.random.default_rng(0), gguf.GGUFWriter(file, "llama"), {}
    for name, shape in {"cube": (3, 5, 2 * block), "vector": (3 * block,)}.items():
        data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * block_bytes), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
        with np.errstate(all="ignore"):
            wanted[name] = torch.from_numpy(gguf.dequantize(data, kind)).view(shape)
    save(writer)
    for name, stored in open_gguf(file).tensors.items():
        assert stored.shape == wanted[name].shape
        rows = len(wanted[name])
        for start, stop in [(0, rows), (1, rows), (rows // 2, rows // 2 + 1), (1, 1)]:
            same(stored.read(start, stop), wanted[name][start:stop])


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0, rtol=0, equal_nan=True)


def test_some_rows_of_a_long_tensor(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than what is decoded at once; nothing else is read."""
    array = np.random.default_rng(0).normal(size=(9, 1 << 18)).astype(np.float32)
    quantised = gguf.quantize(array, Kind.Q8_0)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("q", quantised, raw_dtype=Kind.Q8_0)
    save(writer)
    stored, sizes, pread = open_gguf(file).tensors["q"], [], os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    same(stored.read(1, 8), torch.from_numpy(gguf.dequantize(quantised[1:8], Kind.Q8_0)))
    assert sum(sizes) == quantised[1:8].nbytes and max(sizes) <= 2 << 20


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_what_the_package_cannot_decode_is_refused_by_name(kind: Kind, file: Path) -> None:
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("q", np.zeros((2, block_bytes), np.uint8), raw_shape=(2, block_bytes), raw_dtype=kind)
    save(writer)
    with pytest.raises(TenfoldError, match=rf"m.gguf: tensor q is {kind.name}, which cannot be decoded"):
        open_gguf(file).tensors["q"].whole()


def test_big_endian_is_refused_in_words(file: Path) -> None:
    save(gguf.GGUFWriter(file, "llama", endianess=gguf.GGUFEndian.BIG))
    with pytest.raises(TenfoldError, match=r"m.gguf: .*it is big-endian; only little-endian"):
        open_gguf(file)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(
    keys: list[bytes] = (), tensors: list[bytes] = (), data: int = 0, version: int = 3, **counts: int
) -> bytes:
    """A file of these parts; `keys_claimed` and `tensors_claimed` are what it says there are."""
    claimed = counts.get("tensors_claimed", len(tensors)), counts.get("keys_claimed", len(keys))
    header = b"GGUF" + struct.pack("<IQQ", version, *claimed) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32 + data)


ARRAY, STRING, BOOL, U32, I8 = 9, 8, 7, 4, 1
HUGE = 2**63


def listed(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


def nested(depth: int) -> bytes:
    return b"".join(listed(ARRAY, 1) for _ in range(depth)) + listed(I8, 0)


def aligned(alignment: int) -> bytes:
    return key("general.alignment", U32, struct.pack("<I", alignment))


BROKEN = {
    "empty": (b"", "it does not begin with GGUF"),
    "other": (b"PK\3\4" + bytes(100), "it does not begin with GGUF"),
    "magic alone": (b"GGUF", "it ends within version"),
    "version 1": (container(version=1), "version 1 is not known, only 2 and 3"),
    "version 0": (container(version=0), "version 0 is not known"),
    "version 4": (container(version=4), "version 4 is not known"),
    "keys": (container(keys_claimed=HUGE), r"it claims 9,223,372,036,854,775,808 key-values, more than"),
    "tensors": (container(tensors_claimed=2**64 - 1), "it claims 18,446,744,073,709,551,615 tensors"),
    "one key": (container(keys_claimed=1), "it claims 1 key-values, more than its 32 bytes can hold"),
    "long key": (container([struct.pack("<QQ", HUGE, 0)]), "bytes of a key, more than"),
    "key not text": (container([key(b"\xff\xfe", I8, b"\1")]), "a key is not UTF-8"),
    "value not text": (container([key("k", STRING, text(b"\xff"))]), "key k is not UTF-8"),
    "long value": (container([key("k", STRING, struct.pack("<Q", HUGE))]), "bytes of key k, more than"),
    "key of two lines": (container([key("k\n", I8, b"\1")]), r"a key is 'k\\n', not up to 256 printable"),
    "tensor of two lines": (container([], [tensor("\r", [1])]), r"a tensor's name is '\\r', not up to 256"),
    "endless name": (container([], [tensor("t" * 9999, [1])]), "a tensor's name is 't{256}', not up to 256"),
    "key twice": (container([key("k", I8, b"\1")] * 2), "key k is there twice"),
    "value type": (container([key("k", 13, bytes(8))]), "key k has the unknown value type 13"),
    "boolean": (container([key("k", BOOL, b"\2")]), "key k has a boolean that is neither 0 nor 1"),
    "long array": (container([key("k", ARRAY, listed(I8, HUGE))]), "elements of key k, more than"),
    "long strings": (container([key("k", ARRAY, listed(STRING, 2**40))]), "elements of key k, more than"),
    "array type": (container([key("k", ARRAY, listed(99, 0))]), "key k has the unknown value type 99"),
    "nested": (container([key("k", ARRAY, nested(5000))]), "arrays nested more than 4 deep"),
    "alignment 0": (container([aligned(0)]), "general.alignment 0 is not a power of two"),
    "alignment 24": (container([aligned(24)]), "general.alignment 24 is not a power of two"),
    "alignment text": (container([key("general.alignment", STRING, text("8"))]), "alignment '8' is not"),
    "alignment huge": (
        container([aligned(2**31)], [tensor("t", [1])], data=64),
        r"tensor t ends at 2,147,483,652 of 160 bytes",
    ),
    "no dimensions": (container([], [tensor("t", [])]), "tensor t has 0 dimensions, not 1 to 4"),
    "five dimensions": (container([], [tensor("t", [1] * 5)]), "tensor t has 5 dimensions"),
    "empty tensor": (container([], [tensor("t", [4, 0])]), r"tensor t has shape \(0, 4\), which is empty"),
    "tensor type": (container([], [tensor("t", [32], kind=31)]), "tensor t has the unknown type 31"),
    "removed type": (container([], [tensor("t", [32], kind=4)]), "tensor t has the unknown type 4"),
    "ragged rows": (container([], [tensor("t", [33], kind=8)]), "rows of 33, and Q8_0 blocks of 32"),
    "too long": (container([], [tensor("t", [9])], data=32), "tensor t ends at 100 of 96 bytes"),
    "too long by far": (container([], [tensor("t", [2**62] * 4)], data=32), "tensor t ends at"),
    "behind the end": (container([], [tensor("t", [1], offset=2**63)], data=32), "tensor t ends at"),
    "not aligned": (container([], [tensor("t", [1], offset=4)], data=32), "t is at 4, no multiple of 32"),
    "tensor twice": (
        container([], [tensor("t", [1]), tensor("t", [1], offset=32)], data=64),
        "tensor t is there twice",
    ),
    "overlap": (
        container([], [tensor("s", [16]), tensor("t", [1], offset=32)], data=64),
        "tensor t overlaps the one before it",
    ),
    "split": (
        container([key("split.count", U32, struct.pack("<I", 2**32 - 1))]),
        "it is one of 4294967295 parts of a split model",
    ),
}  # fmt: skip


@contextmanager
def little_memory() -> Iterator[None]:
    """A megabyte, whatever a file claims."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("contents", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files(contents: bytes, message: str, file: Path) -> None:
    file.write_bytes(contents)
    with little_memory(), pytest.raises(TenfoldError, match=message) as caught:
        open_gguf(file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_a_header_beyond_all_reason_is_not_read(file: Path) -> None:
    """As long as it says, but made of nothing: a sparse file of 100 GB."""
    with file.open("wb") as out:
        out.write(container([key("k", ARRAY, listed(I8, 90 << 30))]))
        out.truncate(100 << 30)
    with little_memory(), pytest.raises(TenfoldError, match="makes its header longer than 67,108,864 bytes"):
        open_gguf(file)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TenfoldError, match=r"none.gguf: no such file"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(TenfoldError, match=r"folder.gguf: cannot be read \(Is a directory\)"):
        load_model(tmp_path / "folder.gguf")


def test_a_file_that_shrinks_after_it_was_opened(file: Path) -> None:
    file.write_bytes(container([], [tensor("t", [64])], data=256))
    stored = open_gguf(file).tensors["t"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(TenfoldError, match=r"m.gguf: it ends within tensor t"):
        stored.whole()


FUZZED = ("llama", "deepseek_v3", "gpt_oss")
TELLING = [0, 1, 2, 4, 9, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("whole")
    for family in FUZZED:
        write_model(folder / family, build(expressible(family, 2)))
    return [(folder / family).read_bytes() for family in FUZZED]


@contextmanager
def room(extra: int) -> Iterator[None]:
    """No more address space than there is now and `extra` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """What to do, where in the file (as a fraction), and with which bytes."""
    numbers = st.sampled_from(TELLING).map(lambda n: n.to_bytes(8, "little")[: 4 if n < 2**32 else 8])
    step = st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "cut"]),
        st.floats(0, 1, exclude_max=True),
        numbers | st.binary(min_size=1, max_size=9),
    )
    return draw(st.lists(step, min_size=1, max_size=4))


def damaged(whole: bytes, steps: list[tuple[str, float, bytes]]) -> bytes:
    """Most damage goes to the header, whose end is near the last tensor's name."""
    data = bytearray(whole)
    header = whole.rfind(b"blk.") + 64
    for what, where, values in steps:
        at = int(where * min(header, len(data)))
        if what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = values
        else:
            data[at : at + len(values)] = values if what == "overwrite" else b""
    return bytes(data)


@settings(max_examples=300, deadline=5000)
@given(which=st.integers(0, len(FUZZED) - 1), steps=damage())
def test_damaged_files_load_or_say_why_not(
    which: int, steps: list[tuple[str, float, bytes]], whole_files: list[bytes], tmp_path_factory: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.gguf"
    file.write_bytes(damaged(whole_files[which], steps))
    with room(256 << 20):
        try:
            load_model(file)
        except TenfoldError as error:
            assert str(file) in str(error) and "\n" not in str(error)
