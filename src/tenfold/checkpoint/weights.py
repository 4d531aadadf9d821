"""The weights of a Hugging Face directory, in whichever files it keeps them."""

from pathlib import Path

from tenfold.checkpoint import read_object, safetensors, torch_bin
from tenfold.checkpoint.pack.stored import packed_tensors
from tenfold.checkpoint.quantized import decoded
from tenfold.checkpoint.raw import RawTensor
from tenfold.checkpoint.stored import Stored
from tenfold.errors import TenfoldError
from tenfold.formats import packing_of

FORMATS = (
    (safetensors.SINGLE, safetensors.INDEX, safetensors.list_file),
    (torch_bin.SINGLE, torch_bin.INDEX, torch_bin.list_file),
)
"""The first that a directory has files of is read."""


def list_tensors(directory: Path) -> dict[str, Stored]:
    """Every weight of a model directory, none of it read yet, quantised ones to be decoded on reading.

    Raises TenfoldError naming the file for what is missing, unreadable or no tensor.
    """
    raws, config_json = list_raw(directory), directory / "config.json"
    if config_json.is_file() and packing_of(read_object(config_json), str(config_json)):
        return packed_tensors(raws, config_json)
    return decoded(raws, config_json)


def list_raw(directory: Path) -> dict[str, RawTensor]:
    """Every tensor as the files write it down, with its dtype there."""
    for single, index, list_file in FORMATS:
        if (directory / single).is_file():
            return list_file(directory / single)
        if (directory / index).is_file():
            owners = _read_index(directory / index)
            files = {path: list_file(path) for path in sorted(set(owners.values()))}
            return _pick(owners, files, index)
    names = ", ".join(f"{single} or {index}" for single, index, _ in FORMATS)
    raise TenfoldError(f"{directory}: no weights there; expected {names}")


def _pick(
    owners: dict[str, Path], files: dict[Path, dict[str, RawTensor]], index: str
) -> dict[str, RawTensor]:
    """The tensors that the index names, in the order of the files."""
    for name, path in owners.items():
        if name not in files[path]:
            raise TenfoldError(f"{path}: tensor {name} is missing, though {index} names it")
    return {
        name: raw for path, there in files.items() for name, raw in there.items() if owners.get(name) == path
    }


def _read_index(path: Path) -> dict[str, Path]:
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(str.isprintable, weight_map)):
        raise TenfoldError(f"{path}: field weight_map must map tensor names to files")
    beside = {there.name for there in path.parent.iterdir() if there.is_file()}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise TenfoldError(f"{path}: tensor {name} must name a file beside it, not {file!r}")
        if file not in beside:
            raise TenfoldError(f"{path}: tensor {name} is in {file}, which is not there")
    return {name: path.parent / file for name, file in weight_map.items()}
