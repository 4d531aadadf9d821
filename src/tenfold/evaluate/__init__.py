"""How good a model is: at lm-eval's tasks, or at predicting a text: the verb `eval`."""

from typing import Any

from tenfold.evaluate.settings import EvalSettings
from tenfold.memory import Budget


def evaluate(model: str, settings: EvalSettings, memory: Budget = Budget()) -> dict[str, Any]:  # noqa: B008
    """The figures that `tenfold eval --json` prints.

    Raises TenfoldError for settings that contradict each other and for bad input, where it can before any
    weight is read.
    """
    settings.check()
    if settings.tasks is not None:
        from tenfold.evaluate.tasks import check_installed

        check_installed()
    from tenfold.evaluate.subject import Subject

    subject = Subject(model, settings.context, settings.batch_size, memory)
    if settings.perplexity is not None:
        from tenfold.evaluate.perplexity import perplexity

        return perplexity(subject, settings.perplexity, settings.stride)
    from tenfold.evaluate.tasks import run_tasks

    return run_tasks(subject, settings)
