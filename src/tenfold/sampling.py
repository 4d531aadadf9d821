"""How to choose tokens, and when to stop. Apart from the sampler, so that it needs no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class SamplingParams(BaseModel):
    """How to choose tokens, and when to stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(128, gt=0, description="tokens to generate at most")
    temperature: float = Field(1.0, ge=0, description="0 takes the likeliest token")
    top_k: int | None = Field(None, gt=0, description="only the k likeliest tokens")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest that hold this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="only those at least this share of the likeliest")
    seed: int | None = Field(None, ge=0, lt=2**63, description="same seed, same text")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="strings that end the text"
    )
