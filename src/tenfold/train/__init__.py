"""How a model learns."""

from pathlib import Path
from typing import Any

from tenfold.train.settings import TrainSettings, resolve_config


def train(settings: TrainSettings, out: Path, resume: bool) -> dict[str, Any]:
    """Train one model in the run folder `out`. Returns what result.json holds.

    Raises TenfoldError for bad settings or data, or a folder that holds something else.
    """
    from tenfold.device import pick_device
    from tenfold.train.data import prepare, with_tokenizer
    from tenfold.train.trainer import Trainer

    pick_device(settings.device)
    config = resolve_config(settings)
    data = prepare(settings.data, settings.tokenizer_path, config.vocab_size)
    return Trainer(with_tokenizer(config, data, settings.init), settings, data, out, resume).run()
