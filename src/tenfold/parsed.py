"""Values that come from outside the program: checked, frozen, and refused in one line."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tenfold.errors import TenfoldError, nearest

MAX_LAYERS, MAX_EXPERTS = 1000, 1 << 18
"""Of a model, all its layers' experts counted: several times what any has, and soon looped over."""
MAX_SIZE = (1 << 31) - 1
"""Of any other whole number."""


class Parsed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and value > MAX_SIZE:
                raise ValueError(f"{name} {value} is larger than any model's")
        return self

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Build from outside data; a TenfoldError names `source`, the field and what is accepted."""
        for name in values:
            if name not in cls.model_fields:
                name = name[:100]
                raise TenfoldError(f"{source}: unknown field {name}{nearest(name, cls.model_fields)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise TenfoldError(f"{source}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic found wrong, on one line: field, fault, and the value given."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{field}: {message}, not {problem['input']!r:.100}" if field else message
