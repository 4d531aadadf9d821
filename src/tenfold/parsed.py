"""Values that come from outside the program: checked, frozen, and refused in one line."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tenfold.errors import TenfoldError, nearest


class Parsed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, values: dict[str, Any], source: str) -> Self:
        """Build from outside data; a TenfoldError names `source`, the field and what is accepted."""
        for name in values:
            if name not in cls.model_fields:
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
    return f"{field}: {message}, not {problem['input']!r}" if field else message
