"""The header of a GGUF file, value by value. Nothing it claims is believed before it is checked.

Spec: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from tenfold.errors import TenfoldError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_BYTES = 64 << 20
"""Longest header that is read: as Python objects it can take nine times that. The largest
vocabularies of today (262,144 tokens with their merges) need about 20 MB."""
MAX_DIMS = 4
MAX_NAME = 256  # llama.cpp's own limit for tensors is 64
MAX_NESTING = 4  # llama.cpp writes and reads arrays of scalars and strings only

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of the spec, as `struct` and numpy spell them."""
LEAST_BYTES = {STRING: 8, ARRAY: 12} | {kind: struct.calcsize(code) for kind, code in SCALARS.items()}


class TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    """As in torch: the file lists the fastest axis first."""
    type: int
    offset: int
    """From the start of the data, which follows the header."""


class Header:
    """A file being read from its start; `fail` names it. Lengths are checked against what is left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0

    def fail(self, problem: str) -> NoReturn:
        raise TenfoldError(f"{self.path}: not a valid GGUF file: {problem}")

    def begin(self) -> tuple[int, int]:
        """Past magic and version. Returns how many tensors and how many key-values there are."""
        if self.size < 4 or self.take(4, "magic") != MAGIC:
            self.fail("it does not begin with GGUF")
        version = self.number("I", "version")
        if version and version & 0xFFFF == 0:
            self.fail("it is big-endian; only little-endian files can be read")
        if version not in VERSIONS:
            self.fail(f"version {version} is not known, only {' and '.join(map(str, VERSIONS))}")
        # Name, dimensions, type and offset take 32 bytes at least; key, type and value take 13.
        tensors = self.count(32, "tensors")
        return tensors, self.count(13, "key-values")

    def key_values(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.name("a key")
            if key in values:
                self.fail(f"key {key} is there twice")
            values[key] = self.value(self.number("I", f"key {key}"), f"key {key}")
        return values

    def tensor_info(self) -> TensorInfo:
        name = self.name("a tensor's name")
        what = f"tensor {name}"
        dims = self.number("I", what)
        if not 1 <= dims <= MAX_DIMS:
            self.fail(f"{what} has {dims} dimensions, not 1 to {MAX_DIMS}")
        shape = tuple(self.number("Q", what) for _ in range(dims))[::-1]
        if 0 in shape:
            self.fail(f"{what} has shape {shape}, which is empty")
        return TensorInfo(name, shape, self.number("I", what), self.number("Q", what))

    def value(self, kind: int, what: str, nesting: int = 0) -> Any:
        """A scalar, a string, or an array as a list."""
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, nesting + 1)
        if kind not in SCALARS:
            self.fail(f"{what} has the unknown value type {kind}")
        return self.scalars(kind, 1, what)[0]

    def array(self, what: str, nesting: int) -> list[Any]:
        if nesting > MAX_NESTING:
            self.fail(f"{what} has arrays nested more than {MAX_NESTING} deep")
        kind = self.number("I", what)
        if kind not in LEAST_BYTES:
            self.fail(f"{what} has the unknown value type {kind}")
        count = self.count(LEAST_BYTES[kind], f"elements of {what}")
        if kind in SCALARS:
            return self.scalars(kind, count, what)
        return [self.value(kind, what, nesting) for _ in range(count)]

    def scalars(self, kind: int, count: int, what: str) -> list[Any]:
        import numpy as np

        data = self.take(count * LEAST_BYTES[kind], what)
        if SCALARS[kind] == "?" and count != data.count(0) + data.count(1):
            self.fail(f"{what} has a boolean that is neither 0 nor 1")
        values: list[Any] = np.frombuffer(data, f"<{SCALARS[kind]}").tolist()
        return values

    def string(self, what: str) -> str:
        data = self.take(self.count(1, f"bytes of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def name(self, what: str) -> str:
        """A string that a message can hold."""
        name = self.string(what)
        if not name.isprintable() or len(name) > MAX_NAME:
            self.fail(f"{what} is {name[:MAX_NAME]!r}, not up to {MAX_NAME} printable characters")
        return name

    def number(self, code: str, what: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))
        return int(value)

    def count(self, least_bytes: int, what: str) -> int:
        """How many of something follow, each of which takes so many bytes at least."""
        count = self.number("Q", f"the number of {what}")
        if count * least_bytes > self.size - self.at:
            self.fail(f"it claims {count:,} {what}, more than its {self.size:,} bytes can hold")
        if self.at + count * least_bytes > MAX_BYTES:
            self.fail(f"it claims {count:,} {what}, which makes its header longer than {MAX_BYTES:,} bytes")
        return count

    def take(self, size: int, what: str) -> bytes:
        data = self.file.read(size)
        if len(data) < size:
            self.fail(f"it ends within {what}")
        self.at += size
        return data
