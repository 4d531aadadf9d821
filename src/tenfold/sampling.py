"""How to choose tokens, and when to stop. Apart from the sampler, so that it needs no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator


class SamplingParams(BaseModel):
    """How to choose tokens, and when to stop."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(128, gt=0, description="tokens to generate at most")
    temperature: float = Field(1.0, ge=0, le=100, description="0 takes the likeliest token")
    top_k: int | None = Field(None, gt=0, description="only the k likeliest tokens")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest that hold this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="only those at least this share of the likeliest")
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=100, description="divides the logits of tokens that were there; 1 is none"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken off the logits of tokens that were generated"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="the same for each time that they were generated"
    )
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="by token id: added to its logit"
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="same seed, same text")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="strings that end the text"
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, description="tokens that end the text, besides the model's own"
    )
    ignore_eos: bool = Field(False, description="go on after the tokens that end a text")

    @field_validator("logit_bias")
    @classmethod
    def _by_token_id(cls, bias: dict[str, float]) -> dict[str, float]:
        for token in bias:
            if not (token.isascii() and token.isdecimal() and len(token) < 10):
                raise ValueError(f"{token!r:.40} is no token id")
        return bias
