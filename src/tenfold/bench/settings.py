"""What to measure. Apart from the measuring, so that the command line can read it without torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tenfold.errors import TenfoldError
from tenfold.formats import ExpertsFormat, Packing, RestFormat
from tenfold.memory import parse_size

RANGE_POINTS = 6
"""Budgets of a range, its ends included, equally far apart."""


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

    memory: list[str] = Field(
        default_factory=list,
        description="all that the process may hold, such as 8GiB; several, or a range such as"
        " 2GiB..8GiB, make a curve of speeds",
    )
    warm: Path | None = Field(
        None, description="trace (`tenfold trace`) whose most used experts are read first within --memory"
    )
    plot: Path | None = Field(None, description="SVG file for that curve")

    def check(self, model: str | None) -> None:
        """Raises TenfoldError where the settings, and the model that was named, contradict each other."""
        if model is not None and self.shape is not None:
            raise TenfoldError("give a model or --shape, not both: --shape makes random weights")
        if self.shape is None:
            for option in ("layers", "experts", "rest"):
                if getattr(self, option) is not None:
                    raise TenfoldError(f"--{option} belongs to --shape, which is not given")
        if self.budgets and model is None:
            raise TenfoldError("--memory needs a packed model on disk: experts are read from its files")
        for option in ("plot", "warm"):
            if getattr(self, option) is not None and not self.budgets:
                raise TenfoldError(f"--{option} belongs to --memory, which is not given")
        if self.plot is not None and self.plot.suffix != ".svg":
            raise TenfoldError(f"--plot {self.plot}: name a file that ends in .svg")

    @property
    def budgets(self) -> list[int]:
        """Of --memory, in bytes, the smallest first. TenfoldError for what is no size or range."""
        found: set[int] = set()
        for text in self.memory:
            low, dots, high = text.partition("..")
            first, last = parse_size(low), parse_size(high if dots else low)
            if last < first:
                raise TenfoldError(f"--memory {text!r:.40}: write the smaller size first")
            steps = RANGE_POINTS - 1
            found |= {first + (last - first) * step // steps for step in range(RANGE_POINTS)}
        return sorted(found)

    @property
    def packing(self) -> Packing:
        """The formats of random weights."""
        given = {"experts": self.experts, "rest": self.rest}
        return Packing.model_validate({part: form for part, form in given.items() if form})
