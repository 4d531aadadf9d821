"""What to measure. Apart from the measuring, so that the command line can read it without torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tenfold.errors import TenfoldError

DEFAULT_EXPERTS, DEFAULT_REST = "q4", "q8"


class BenchSettings(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str | None = Field(None, description="a preset, measured with random weights")
    layers: int | None = Field(None, gt=0, description="only so many layers of --shape")
    experts: Literal["bf16", "q8", "q4", "mxfp4"] | None = Field(
        None, description=f"format of the routed experts of --shape [default: {DEFAULT_EXPERTS}]"
    )
    rest: Literal["bf16", "q8", "q4"] | None = Field(
        None, description=f"format of all other matrices of --shape [default: {DEFAULT_REST}]"
    )
    prompt_tokens: int = Field(512, gt=0, description="tokens of a prompt")
    tokens: int = Field(64, gt=0, description="tokens to decode after it")
    batch: int = Field(1, gt=0, le=4096, description="sequences at once")
    threads: int | None = Field(
        None, gt=0, le=4096, description="threads to compute with; by default all there are"
    )

    def check(self, model: str | None) -> None:
        """Raises TenfoldError where the settings, and the model that was named, contradict each other."""
        if model is not None and self.shape is not None:
            raise TenfoldError("give a model or --shape, not both: --shape makes random weights")
        if self.shape is None:
            for option in ("layers", "experts", "rest"):
                if getattr(self, option) is not None:
                    raise TenfoldError(f"--{option} belongs to --shape, which is not given")
