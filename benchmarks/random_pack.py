"""The random weights of `tenfold bench --shape` as a packed directory: a layer is in memory at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tenfold.checkpoint import safetensors
from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.pack.folder import growing_folder
from tenfold.checkpoint.pack.layout import Part, parts_by_file, without_predictor
from tenfold.checkpoint.pack.shard import Entry, in_order, write_shard
from tenfold.config import ModelConfig
from tenfold.engine.random_weights import RandomRows, random_weight
from tenfold.files import write_json
from tenfold.formats import Packing
from tenfold.packed import PackedExperts, PackedMatrix


def write_random_pack(out: Path, config: ModelConfig, packing: Packing) -> None:
    """Without a tokenizer. The folder is there only once it is whole."""
    config, source = without_predictor(config), RandomRows()
    files = parts_by_file(config, packing)
    weight_map: dict[str, str] = {}
    with growing_folder(out, {"shape": config.model_dump(mode="json"), **packing.to_hf()}) as folder:
        for number, parts in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            entries = in_order(entry for part in parts for entry in _entries(part, source))
            write_shard(folder / name, entries, lambda _: None)
            weight_map |= {entry.name: name for entry in entries}
        write_json(folder / safetensors.INDEX, {"weight_map": weight_map})
        hf = family_for(config).to_hf(config) | {"quantization_config": packing.to_hf()}
        write_json(folder / "config.json", hf)


def _entries(part: Part, source: RandomRows) -> Iterator[Entry]:
    weight = random_weight(source, part)
    if isinstance(weight, PackedExperts):
        tensors = list(weight.records)
    else:
        tensors = [weight.panels if isinstance(weight, PackedMatrix) else weight]
    for (name, shape), tensor in zip(part.stored.items(), tensors, strict=True):
        yield Entry(name, tensor.dtype, shape, part.label, partial(list, [tensor]))
