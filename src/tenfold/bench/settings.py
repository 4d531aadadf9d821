"""What to measure. Apart from the measuring, so that the command line can read it without torch."""

from pydantic import BaseModel, ConfigDict, Field

from tenfold.errors import TenfoldError
from tenfold.formats import ExpertsFormat, Packing, RestFormat


class BenchSettings(BaseModel):
    """What to measure."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str | None = Field(None, description="a preset, measured with random weights")
    layers: int | None = Field(None, gt=0, description="only so many layers of --shape")
    experts: ExpertsFormat | None = Field(
        None, description="format of the routed experts of --shape; by default as pack does"
    )
    rest: RestFormat | None = Field(
        None, description="format of all other matrices of --shape; by default as pack does"
    )
    prompt_tokens: int = Field(512, gt=0, description="tokens of a prompt")
    tokens: int = Field(64, gt=0, description="tokens to decode after it")
    batch: int = Field(1, gt=0, le=4096, description="sequences at once")
    threads: int | None = Field(
        None, gt=0, description="threads to compute with; by default one a core, or OMP_NUM_THREADS"
    )

    def check(self, model: str | None) -> None:
        """Raises TenfoldError where the settings, and the model that was named, contradict each other."""
        if model is not None and self.shape is not None:
            raise TenfoldError("give a model or --shape, not both: --shape makes random weights")
        if self.shape is None:
            for option in ("layers", "experts", "rest"):
                if getattr(self, option) is not None:
                    raise TenfoldError(f"--{option} belongs to --shape, which is not given")

    @property
    def packing(self) -> Packing:
        """The formats of random weights."""
        given = {"experts": self.experts, "rest": self.rest}
        return Packing.model_validate({part: form for part, form in given.items() if form})
