"""A small packed model with random weights, a tokenizer and a chat template that knows tools."""

import json
from pathlib import Path

from random_pack import write_random_pack
from rows import preset
from scripted_engine import CHATML
from vocabulary import write_tokenizer

from tenfold.formats import Packing

CONTEXT = 256


def write_served_model(folder: Path, width: int = 64, context: int = CONTEXT) -> Path:
    """`width` is that of its experts."""
    sizes = {"max_position_embeddings": context, "moe_intermediate_size": width}
    config = preset("demo").model_copy(update=sizes)
    out = folder / "small"
    write_random_pack(out, config, Packing(experts="q4", rest="q8"))
    write_tokenizer(out, config.vocab_size)
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"chat_template": CHATML}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out
