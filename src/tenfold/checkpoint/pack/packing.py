"""`tenfold pack`: any decoder-only checkpoint made a packed one, a piece of a matrix at a time."""

import hashlib
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tenfold.checkpoint import safetensors
from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.opening import Checkpoint, open_checkpoint
from tenfold.checkpoint.pack.calibrate import calibrate, read_text
from tenfold.checkpoint.pack.encode import entries
from tenfold.checkpoint.pack.folder import growing_folder
from tenfold.checkpoint.pack.layout import parts_by_file, without_predictor
from tenfold.checkpoint.pack.shard import Entry, in_order, write_shard
from tenfold.checkpoint.pack.source import read_as_ours
from tenfold.checkpoint.pack.tokenizer_files import copy_tokenizer
from tenfold.config import ModelConfig
from tenfold.files import write_json
from tenfold.formats import Packing
from tenfold.hub import resolve
from tenfold.switch_config import decoder_only


def pack(
    path_or_id: str | Path, out: Path, packing: Packing, calibration: Path | None = None
) -> dict[str, Any]:
    """Write the model of a directory, GGUF file or hub id to `out`, packed, and return a summary of it.

    Memory is bounded by the largest expert or 32 MiB of a matrix, whatever the model's size; a matrix
    that a GGUF file holds in another order of rows is read whole. Files are finished one at a time,
    and after an interruption the same call goes on after the last whole one. A multi-token-prediction
    module is left out. With `calibration`, a text file, the whole model reads it first, and columns with
    larger inputs are rounded with more care.

    Raises TenfoldError for weights that are not finite, naming the tensor, for an encoder-decoder, and
    where `out` is there or cannot be written.
    """
    began = time.perf_counter()
    path = resolve(path_or_id)
    checkpoint = open_checkpoint(path)
    config = without_predictor(decoder_only(checkpoint.config, str(path)))
    tensors = read_as_ours(checkpoint)
    text = read_text(calibration) if calibration else ""
    with growing_folder(out, _identity(path, checkpoint, packing, text)) as folder:
        importance = calibrate(path, text) if text else {}
        shards = [
            in_order(entry for part in parts for entry in entries(part, tensors, importance))
            for parts in parts_by_file(config, packing)
        ]
        resumed = _write_shards(folder, shards)
        write_json(folder / "config.json", _config_json(config, packing))
        write_json(folder / safetensors.INDEX, _index(shards))
        copy_tokenizer(path, folder)
    num_bytes = sum(entry.num_bytes for shard in shards for entry in shard)
    return {
        "out": str(out),
        "experts": packing.experts,
        "rest": packing.rest,
        "files": len(shards),
        "files_from_before": resumed,
        "weight_bytes": num_bytes,
        "bits_per_weight": 8 * num_bytes / config.num_params(),
        "left_out_mtp_params": checkpoint.config.mtp_params(),
        "seconds": time.perf_counter() - began,
    }


def _identity(path: Path, checkpoint: Checkpoint, packing: Packing, text: str) -> dict[str, Any]:
    """What two runs must share for one to go on with the other's files."""
    sources = sorted({stored.file for stored in checkpoint.tensors.values()})
    stats = {file.name: file.stat() for file in sources}
    return {
        "source": str(path.resolve()),
        **packing.to_hf(),
        "calibration text": hashlib.sha256(text.encode()).hexdigest()[:12] if text else "none",
        "source_files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def _write_shards(folder: Path, shards: list[list[Entry]]) -> int:
    """Write those that are not there, and return how many were."""
    sizes = [sum(entry.num_bytes for entry in shard) for shard in shards]
    paths = [folder / name for name in _names(shards)]
    done = [path.is_file() for path in paths]
    done_bytes = sum(size for size, there in zip(sizes, done, strict=True) if there)
    with _progress() as bar:
        task = bar.add_task("packing", total=sum(sizes), completed=done_bytes)
        for path, shard, there in zip(paths, shards, done, strict=True):
            if not there:
                write_shard(path, shard, lambda size: bar.advance(task, size))
    return sum(done)


def _progress() -> Progress:
    """A bar on stderr, with rate and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _names(shards: list[list[Entry]]) -> list[str]:
    return [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]


def _config_json(config: ModelConfig, packing: Packing) -> dict[str, Any]:
    return {**family_for(config).to_hf(config), "quantization_config": packing.to_hf()}


def _index(shards: list[list[Entry]]) -> dict[str, Any]:
    named = zip(_names(shards), shards, strict=True)
    return {
        "metadata": {"total_size": sum(entry.num_bytes for shard in shards for entry in shard)},
        "weight_map": {entry.name: name for name, shard in named for entry in shard},
    }
