"""The one schema of a training run: TOML files and the command line both fill it in."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from tenfold.config import ModelConfig
from tenfold.errors import TenfoldError

_OVERRIDES: dict[str, Any] = {
    name: (field.annotation | None, Field(None, description=field.description))  # type: ignore[operator]
    for name, field in ModelConfig.model_fields.items()
}
if TYPE_CHECKING:
    ModelOverrides = BaseModel
else:
    ModelOverrides = create_model(
        "ModelOverrides", __config__=ConfigDict(extra="forbid", frozen=True), **_OVERRIDES
    )


class TrainSettings(BaseModel):
    """What to train, on what, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("demo", description="model to start from; see --model.* to change it")
    model: ModelOverrides = Field(
        default_factory=ModelOverrides, description="config fields that differ from the preset"
    )
    init: str | None = Field(
        None, description="model whose weights to go on from: a directory, GGUF file or hub id"
    )
    data: list[str] = Field(
        ["stdlib"], description="text, .jsonl or .parquet files, folders, hf:NAME, or stdlib"
    )
    tokenizer: Path | None = Field(
        None,
        description="tokenizer.json, tokenizer.model or .gguf; by default init's, else a new one",
    )

    tokens: int = Field(2_000_000, gt=0, description="training tokens in all")
    seq_len: int = Field(256, gt=1, description="tokens of context")
    batch_size: int = Field(32, gt=0, description="sequences in an optimizer step")
    micro_batch_size: int | None = Field(
        None, gt=0, description="sequences in one forward pass; must divide batch_size"
    )

    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="muon for the matrices with adamw for the rest, or adamw for all"
    )
    learning_rate: float = Field(0.02, gt=0, description="peak; adamw beside muon takes half of it")
    weight_decay: float = Field(0.1, ge=0, description="on the matrices")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps that warm up")
    decay: float = Field(0.5, ge=0, le=1, description="share of the steps that decay to zero")
    max_grad_norm: float = Field(1.0, gt=0)

    balance_loss: float = Field(0.03, ge=0, description="weight of the load-balancing loss (Switch)")
    sequence_loss: float = Field(0.0, ge=0, description="weight of the sequence-wise balance loss")
    z_loss: float = Field(0.001, ge=0, description="weight of the router z-loss")
    locality_loss: float = Field(
        0.0, ge=0, description="weight of the loss that has tokens reuse experts, for streaming them"
    )
    mtp_loss: float = Field(
        0.0, ge=0, description="weight of predicting one token further (num_nextn_predict_layers 1)"
    )
    bias_update_rate: float = Field(
        0.0, ge=0, description="step of the aux-loss-free bias of a sigmoid router"
    )

    precision: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="of matrix products; auto is bfloat16 where the machine has it"
    )
    compile: bool = Field(False, description="torch.compile the layers; see LOG.md for when it pays")
    device: str = Field("auto", description="cpu, cuda, or auto")
    seed: int = Field(0, ge=0, lt=2**63, description="of the initial weights and the order of the data")

    evaluations: int = Field(8, gt=0, description="validation points over the run")
    checkpoint_every: int = Field(50, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "TrainSettings":
        if self.batch_size % self.rows:
            raise ValueError(f"micro_batch_size {self.rows} must divide batch_size {self.batch_size}")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are more than the whole run")
        if self.steps < 1:
            raise ValueError(
                f"tokens {self.tokens} is less than one step of batch_size x seq_len = {self.step_tokens}"
            )
        return self

    @property
    def tokenizer_path(self) -> Path | None:
        """Where the tokenizer is, if it is not to be trained."""
        return self.tokenizer or (Path(self.init) if self.init else None)

    @property
    def rows(self) -> int:
        """Sequences in one forward pass."""
        return self.micro_batch_size or self.batch_size

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        return self.tokens // self.step_tokens


def resolve_config(settings: TrainSettings) -> ModelConfig:
    """The preset with the run's overrides, or the config of the model that the run goes on from.

    Raises TenfoldError naming the field that is wrong.
    """
    config = _of_init(settings, settings.init) if settings.init else _of_preset(settings)
    if settings.seq_len > config.max_position_embeddings:
        raise TenfoldError(
            f"seq_len {settings.seq_len} is more than the model's max_position_embeddings"
            f" {config.max_position_embeddings}"
        )
    untrained = config.num_nextn_predict_layers and not settings.mtp_loss and not settings.init
    if untrained or (settings.mtp_loss and not config.num_nextn_predict_layers):
        raise TenfoldError(
            f"mtp_loss {settings.mtp_loss} and num_nextn_predict_layers {config.num_nextn_predict_layers}"
            " go together: set both, or neither"
        )
    return config


def _of_preset(settings: TrainSettings) -> ModelConfig:
    from tenfold.presets import load_preset  # families and readers, which --help can do without
    from tenfold.switch_config import decoder_only

    preset = decoder_only(load_preset(settings.preset), f"preset {settings.preset}").model_dump()
    return ModelConfig.parse(preset | settings.model.model_dump(exclude_none=True), "model")


def _of_init(settings: TrainSettings, init: str) -> ModelConfig:
    from tenfold.checkpoint.opening import open_checkpoint
    from tenfold.hub import resolve
    from tenfold.switch_config import decoder_only

    if settings.model.model_fields_set:
        raise TenfoldError("model: the model that init names has its shape; leave the overrides out")
    return decoder_only(open_checkpoint(resolve(init)).config, init)
