"""Reading metadata of one architecture, whose keys begin with its name."""

import reprlib
from typing import Any, NoReturn

from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError


class Fields:
    """Metadata and tensors of a file; every problem is a TenfoldError that names file and key."""

    def __init__(self, metadata: dict[str, Any], tensors: dict[str, Stored], source: str) -> None:
        self.metadata, self.tensors, self.source = metadata, tensors, source
        self.architecture = metadata.get("general.architecture")

    def fail(self, name: str, accepted: str) -> NoReturn:
        key = f"{self.architecture}.{name}"
        given = reprlib.repr(self.metadata.get(key))
        raise TenfoldError(f"{self.source}: {key} {given} is not supported, only {accepted}")

    def get(self, name: str, default: Any = None) -> Any:
        """A value; a list with one entry a layer counts as that value if all are the same."""
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if isinstance(value, list):
            if not value or any(other != value[0] for other in value):
                self.fail(name, "one value for all layers")
            value = value[0]
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise TenfoldError(f"{self.source}: key {self.architecture}.{name} is missing")
        if type(value) is not int or value < 0:
            self.fail(name, "a whole number")
        return int(value)

    def real(self, name: str, default: float | None = None) -> float:
        """A number as it was before it became a float32: the shortest decimal that rounds to it."""
        import numpy as np

        value = self.get(name, default)
        if value is None:
            raise TenfoldError(f"{self.source}: key {self.architecture}.{name} is missing")
        if type(value) not in (int, float) or not 0 <= value <= np.finfo(np.float32).max:
            self.fail(name, "a number from 0")
        return float(str(np.float32(value))) if np.float32(value) == value else float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.fail(name, "true or false")
        return bool(value)

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse a key that is there with another value."""
        if self.get(name, accepted[0]) not in accepted:
            self.fail(name, " or ".join(repr(value) for value in accepted))

    def token(self, name: str, vocab_size: int) -> int | None:
        """The id of a special token, or None; llama.cpp passes over ids outside the vocabulary too."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < vocab_size else None

    def rows(self, name: str) -> int:
        """Of a tensor that must be there."""
        if name not in self.tensors:
            raise TenfoldError(f"{self.source}: tensor {name} is missing")
        return self.tensors[name].shape[0]
