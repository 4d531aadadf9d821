"""Which experts each token chose: recorded in a file, and what follows from it for a store of experts.

Shapes: T tokens in the order they came, L layers with experts in order of depth, K experts a token and layer,
E experts a layer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError
from tenfold.files import check_writable, write_text


def trace(
    model: str, data: Sequence[str], tokens: int, out: Path | None, picture: Path | None
) -> dict[str, Any]:
    """What a trace says (`analysis.analyse`), drawn in `picture` too; with `data` it is first recorded.

    `model` is then the model that reads the sources in `data`, `out` the file that keeps the trace; without
    `data`, `model` is such a file. Raises TenfoldError for bad input, before anything is read or run where
    the arguments alone show it.
    """
    if bool(data) != (out is not None):
        raise TenfoldError("--data and --out go together: text to read, and the file that keeps the trace")
    if out is not None and out.exists():
        raise TenfoldError(f"{out} is there already: choose another --out")
    if picture is not None and picture.suffix != ".svg":
        raise TenfoldError(f"--plot {picture}: name a file that ends in .svg")
    if picture is not None and picture in (out, Path(model)):
        raise TenfoldError(f"--plot {picture}: that is the trace's own file")
    for written in filter(None, (out, picture)):
        check_writable(written)
    from rich.console import Console

    from tenfold.trace.analysis import analyse
    from tenfold.trace.file import load, save
    from tenfold.trace.record import record

    console = Console(stderr=True)
    if out is None:
        recorded = load(Path(model))
    else:
        with console.status("the model is reading"):
            recorded = record(model, data, tokens)
        save(recorded, out)
    with console.status("working out what stores would have held"):
        found = analyse(recorded)
    if picture is not None:
        from tenfold.trace.plot import draw

        write_text(picture, draw(found))
    return found
