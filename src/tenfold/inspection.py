"""What is in a model and what it will need: counted from its config, and read off its files."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.checkpoint import load_config
from tenfold.checkpoint.families import family_for
from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.checkpoint.stored import Stored
from tenfold.compiled import isa
from tenfold.counting import BITS_PER_WEIGHT, BYTES_PER_WEIGHT
from tenfold.hub import resolve
from tenfold.presets import load_preset
from tenfold.switch_config import AnyConfig

if TYPE_CHECKING:
    from rich.table import Table


def inspect(model: str, context: int, verify: bool = False) -> dict[str, Any]:
    """`describe` for a preset, a directory, a GGUF file or a hub id, of which only the config is fetched.

    For a file, or a directory with weights, `stored` too: what `_stored` counts. With `verify`, every
    checksum of a packed directory is checked: `verified` counts them, a TenfoldError names what is damaged.
    """
    if verify:
        return inspect(model, context) | {"verified": _verified(model)}
    if "/" not in model and not model.endswith(".gguf") and not Path(model).exists():
        return describe(load_preset(model), context) | {"kernels": isa()}
    path = resolve(model, "config")
    found = describe(load_config(path), context) | {"kernels": isa()}
    if path.is_file() or (path == Path(model) and _has_weights(path)):
        found["stored"] = _stored(path)
    return found


def _verified(model: str) -> dict[str, int]:
    from tenfold.checkpoint.pack.verify import verify

    return verify(model)


def _has_weights(directory: Path) -> bool:
    return any(any(directory.glob(files)) for files in ("*.safetensors", "pytorch_model*.bin"))


def _stored(path: Path) -> dict[str, Any]:
    """The files of a model, their bytes, and the bytes of their tensors by format."""
    tensors = open_gguf(path).tensors if path.is_file() else _list_tensors(path)
    files = {stored.file for stored in tensors.values()}
    by_form: Counter[str] = Counter()
    for stored in tensors.values():
        by_form[stored.form] += stored.num_bytes
    return {
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "tensor_bytes": dict(by_form.most_common()),
    }


def _list_tensors(directory: Path) -> dict[str, Stored]:
    from tenfold.checkpoint.weights import list_tensors  # imports torch, which a preset need not wait for

    return list_tensors(directory)


def describe(config: AnyConfig, context: int) -> dict[str, Any]:
    """Parameters by kind, FLOPs of a token at `context`, bytes by format. Names are stable."""
    counts, total = config.params(), config.num_params()
    active = config.num_active_params()
    return {
        "architecture": family_for(config).architecture,
        "total_params": total,
        "active_params": active,
        "active_params_without_input_embedding": config.num_active_params(input_embedding=False),
        "active_fraction": active / total,
        "embedding_params": counts.embedding,
        "lm_head_params": counts.lm_head,
        "attention_params": counts.attention,
        "norm_params": counts.norms,
        "dense_mlp_params": counts.dense_mlp,
        "shared_expert_params": counts.shared_experts,
        "router_params": counts.router,
        "expert_params": counts.experts,
        "bias_params": counts.biases,
        "mtp_params": config.mtp_params(),
        "experts": config.num_experts,
        "experts_per_token": config.num_experts_per_tok,
        "context": context,
        "flops_per_token": config.flops_per_token(context),
        "weights_per_token": config.weights_per_token(),
        "weights_per_token_fraction": config.weights_per_token() / total,
        "weight_bytes": {form: config.weight_bytes(form) for form in BITS_PER_WEIGHT},
        "weight_bytes_per_token": {form: config.weight_bytes_per_token(form) for form in BITS_PER_WEIGHT},
        "kv_bytes_per_token": {form: config.kv_bytes_per_token(form) for form in BYTES_PER_WEIGHT},
    }


def tables(found: dict[str, Any], title: str) -> list["Table"]:
    """What `inspect` found, for people: parameters, what one token takes, memory by format, files."""
    stored = [_on_disk(found["stored"])] if "stored" in found else []
    verified = [_checked(found["verified"])] if "verified" in found else []
    return [_parameters(found, title), _one_token(found), _memory(found), *stored, *verified]


def _parameters(found: dict[str, Any], title: str) -> "Table":
    table = _table(f"{title}: {found['architecture']}", "parameters", "", "exact")
    experts = f"routed experts: {found['experts']:,}, {found['experts_per_token']} a token"
    rows = {
        "total": "total_params",
        "active, with the input embedding": "active_params",
        "active, without it": "active_params_without_input_embedding",
        experts: "expert_params",
        "shared experts": "shared_expert_params",
        "routers": "router_params",
        "dense feed-forward": "dense_mlp_params",
        "attention": "attention_params",
        "input embedding": "embedding_params",
        "output head": "lm_head_params",
        "norms": "norm_params",
        "biases": "bias_params",
        "multi-token prediction, beside the total": "mtp_params",
    }
    for label, name in rows.items():
        if found[name]:
            table.add_row(label, _scaled(found[name], 1000, ["", "k", "M", "B", "T"]), f"{found[name]:,}")
    return table


def _one_token(found: dict[str, Any]) -> "Table":
    table = _table("", f"one token after {found['context']:,}", "", "exact")
    flops, weights = found["flops_per_token"], found["weights_per_token"]
    table.add_row("FLOPs", _scaled(flops, 1000, ["", "k", "M", "G", "T"]), f"{flops:,}")
    percent = 100 * found["weights_per_token_fraction"]
    table.add_row("weights it touches", f"{percent:.3g}%", f"{weights:,}")
    return table


def _memory(found: dict[str, Any]) -> "Table":
    table = _table("", "memory", "all weights", "exact bytes", "a token reads", "KV a token")
    kernels = f"{found['kernels']} kernels" if found["kernels"] else "torch, without native kernels"
    table.caption = (
        f"if every weight were in it; files keep norms and routers wider\npacked models run here on {kernels}"
    )
    for form, size in found["weight_bytes"].items():
        read, kv = found["weight_bytes_per_token"][form], found["kv_bytes_per_token"].get(form)
        table.add_row(form, _bytes(size), f"{size:,}", _bytes(read), "" if kv is None else _bytes(kv))
    return table


def _on_disk(stored: dict[str, Any]) -> "Table":
    table = _table("", "stored", "", "exact bytes")
    for form, size in stored["tensor_bytes"].items():
        table.add_row(f"tensors in {form}", _bytes(size), f"{size:,}")
    files = "1 file" if stored["files"] == 1 else f"{stored['files']:,} files"
    table.add_row(files, _bytes(stored["file_bytes"]), f"{stored['file_bytes']:,}")
    return table


def _checked(verified: dict[str, int]) -> "Table":
    table = _table("", "verified", "", "exact bytes")
    table.add_row(f"{verified['tensors']:,} tensors", _bytes(verified["bytes"]), f"{verified['bytes']:,}")
    return table


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _bytes(size: int) -> str:
    return _scaled(size, 1024, ["B", "KiB", "MiB", "GiB", "TiB"])


def _scaled(number: float, step: int, units: list[str]) -> str:
    """To four digits, in the largest unit that leaves at least one before the point."""
    for unit in units:
        if number < step or unit == units[-1]:
            break
        number /= step
    return f"{number:,.4g} {unit}".strip()
