"""What to evaluate. Apart from the evaluating, so that the command line can read it without torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from tenfold.errors import TenfoldError


class EvalSettings(BaseModel):
    """What to evaluate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: str | None = Field(
        None, description="tasks, groups or tags of lm-eval, or patterns of them: arc_easy,mmlu_*"
    )
    perplexity: str | None = Field(
        None, description="text to predict, as --data of train takes it: a file, a folder, stdlib or hf:NAME"
    )
    limit: int | None = Field(None, gt=0, description="only so many examples of each task")
    num_fewshot: int | None = Field(
        None, ge=0, description="solved examples before each question; by default what the task says"
    )
    include_path: Path | None = Field(None, description="folder of your own tasks (.yaml, as lm-eval reads)")
    apply_chat_template: bool = Field(
        False, description="ask as a user in a conversation, in the model's chat template"
    )
    context: int | None = Field(
        None,
        gt=0,
        description="tokens the model sees at most; by default its whole context, up to 4096",
    )
    stride: int | None = Field(
        None,
        gt=0,
        description="tokens of --perplexity that each window predicts after the first one; by default half"
        " the context: the other half is what they are predicted from at least",
    )
    batch_size: int = Field(8, gt=0, le=4096, description="texts at once, where each is as long as --context")

    def check(self) -> None:
        """Raises TenfoldError where the settings contradict each other."""
        if (self.tasks is None) == (self.perplexity is None):
            raise TenfoldError("give either --tasks or --perplexity")
        tasks_only = ("limit", "num_fewshot", "include_path", "apply_chat_template")
        strangers, home = (tasks_only, "tasks") if self.tasks is None else (("stride",), "perplexity")
        for name in strangers:
            if getattr(self, name) is not None and getattr(self, name) is not False:
                raise TenfoldError(f"--{name.replace('_', '-')} belongs to --{home}, which is not given")
