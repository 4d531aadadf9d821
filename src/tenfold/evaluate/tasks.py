"""lm-eval's tasks: found by name, put to a model, and what came of it."""

import difflib
import json
import random
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError
from tenfold.evaluate.settings import EvalSettings
from tenfold.evaluate.subject import Subject

REPORTED = ("results", "groups", "group_subtasks", "n-shot", "n-samples", "versions", "higher_is_better")
"""Of what lm-eval returns."""
NEAR = 5
"""Names that are told where one is not found."""


def check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise TenfoldError("--tasks needs lm-eval, which is not installed: pip install 'tenfold[eval]'")


def run_tasks(subject: Subject, settings: EvalSettings) -> dict[str, Any]:
    """What `tenfold eval --tasks --json` prints: lm-eval's results under its own names.

    Raises TenfoldError for tasks that are not there, and for what goes wrong in them, such as data that
    cannot be fetched.
    """
    from lm_eval import __version__ as lm_eval_version
    from lm_eval import evaluate
    from lm_eval.utils import handle_non_serializable

    from tenfold.evaluate.lm_eval_model import TenfoldLM

    with redirect_stdout(sys.stderr):  # lm-eval prints what it does
        names, manager = _find(settings.tasks or "", settings.include_path)
        try:
            found = evaluate(
                TenfoldLM(subject),
                _load(names, manager, settings.num_fewshot),
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=True,
                log_samples=False,
            )
        except TenfoldError:
            raise
        except Exception as error:  # tasks are others' code and data
            raise TenfoldError(f"{', '.join(names)}: {type(error).__name__}: {error}") from error
    reported = {name: found[name] for name in REPORTED if name in found}
    plain = json.loads(json.dumps(reported, default=handle_non_serializable))
    return {"model": subject.name, **plain, "lm_eval_version": lm_eval_version}


def _load(names: Sequence[str], manager: Any, num_fewshot: int | None) -> Any:
    """As lm-eval's `simple_evaluate` does, which besides starts git and pip to report the environment."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = manager.load(names)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 could not do with more
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _find(wanted: str, include_path: Path | None) -> tuple[list[str], Any]:
    """Names of tasks, and lm-eval's manager that knows them."""
    from lm_eval.tasks import TaskManager

    patterns = [pattern.strip() for pattern in wanted.split(",")]
    if include_path is not None:
        _check_folder(include_path)
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(patterns) <= set(
            manager.all_subtasks
        ):  # without the 20 seconds that reading all of lm-eval's takes
            return patterns, manager
    manager = TaskManager(include_path=include_path)
    names = []
    for pattern in patterns:
        if not (matching := manager.match_tasks([pattern])):
            raise TenfoldError(_unknown(pattern, manager.all_tasks))
        names += matching
    return list(dict.fromkeys(names)), manager


def _check_folder(folder: Path) -> None:
    """lm-eval passes over a folder that is not there and files that it cannot read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise TenfoldError(f"--include-path {folder}: no such folder")
    files = sorted(folder.rglob("*.yaml"))
    if not files:
        raise TenfoldError(f"--include-path {folder}: there is no task (.yaml file) in it")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of YAML, of encodings, of what a file includes
            raise TenfoldError(f"{file}: not a task of lm-eval: {error}") from None


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, NEAR)
    hint = f"near names are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
    return f"--tasks: {name} is no task, group or tag of lm-eval, nor in --include-path: {hint}"
