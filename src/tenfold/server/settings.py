"""How to serve. Apart from the serving, so that the command line can read it without FastAPI."""

import os
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

KEY_VARIABLE = "TENFOLD_API_KEY"


class ServeSettings(BaseModel):
    """How to serve."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one of this machine")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model_name: str | None = Field(
        None, min_length=1, description="what clients call the model; by default the last part of its path"
    )
    api_key: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description=f"clients must give it, or another one of several; also read from {KEY_VARIABLE}",
    )
    cors_origin: list[str] = Field(
        default_factory=list,
        description="web pages of this origin, such as https://example.com, may call; * is any",
    )

    context: int | None = Field(
        None,
        gt=0,
        description="tokens that one conversation may have; by default 4096, or what the model has",
    )
    max_sequences: int = Field(16, gt=0, le=4096, description="texts that are generated at once")
    kv_tokens: int | None = Field(
        None, gt=0, description="tokens that the KV cache holds, of all texts together"
    )
    max_queue: int = Field(
        128, ge=0, le=100_000, description="requests that may wait; the next one is refused (429)"
    )
    max_body_bytes: int = Field(2 << 20, gt=0, description="of a request; a larger one is refused (413)")
    request_timeout: float = Field(600, gt=0, description="seconds that a request may take, waiting included")
    grace: float = Field(30, ge=0, description="seconds that running requests have to end after SIGTERM")

    price_per_hour: float | None = Field(
        None, ge=0, description="of this machine, in any currency: answers then say what they cost"
    )
    watts: float | None = Field(None, ge=0, description="that it draws while it computes")
    price_per_kwh: float | None = Field(None, ge=0, description="of electricity; needs --watts")

    @model_validator(mode="after")
    def _electricity(self) -> Self:
        if self.price_per_kwh is not None and self.watts is None:
            raise ValueError("price_per_kwh says nothing without watts")
        return self

    @property
    def keys(self) -> list[str]:
        """All that open the server; none where it is open to everyone."""
        named = os.environ.get(KEY_VARIABLE)
        return [*self.api_key, *([named] if named else [])]
