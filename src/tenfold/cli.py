"""The command line: one verb is one function that parses and calls one module."""

import json as json_
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError

# Settings are classes whose annotations the parser reads: importing them must stay cheap.
from tenfold.bench.settings import BenchSettings
from tenfold.errors import TenfoldError
from tenfold.evaluate.settings import EvalSettings
from tenfold.formats import ExpertsFormat, Packing, RestFormat
from tenfold.memory import Budget, parse_size
from tenfold.parsed import first_problem
from tenfold.sampling import SamplingParams
from tenfold.server.settings import ServeSettings
from tenfold.train.settings import TrainSettings

if TYPE_CHECKING:
    from tenfold.engine.generation import Generation

app = App(
    name="tenfold",
    help="Sparse (Mixture-of-Experts) language models, from training to running, with an honest meter.",
    version_flags=[],
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)

Flat = Parameter(name="*")
Json = Annotated[bool, Parameter(negative="", help="print one JSON object instead of a table")]
Out = Annotated[Path, Parameter(name=("--out", "-o"))]
Context = Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1))]
Memory = Annotated[
    int | None,
    Parameter(
        converter=lambda _, tokens: parse_size(tokens[0].value),
        help="all that the process may hold, such as 8GiB: experts of a packed model that do not fit are read"
        " from disk when they are wanted; by default what is free, less a margin",
    ),
]
Tokens = Annotated[int, Parameter(validator=cyclopts.validators.Number(gte=1))]
Warm = Annotated[
    Path | None,
    Parameter(help="trace (`tenfold trace`) whose most used experts are read first, where not all fit"),
]
Resume = Annotated[bool, Parameter(negative="", help="go on with the run that is in --out")]


@app.command
def demo(
    *,
    out: Path = Path("tenfold-demo"),
    data: list[str] | None = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Train a sparse model and its two dense twins in minutes, offline, and report what it bought.

    Parameters
    ----------
    out
        folder for the models, report.html and report.json
    data
        your own text (files or folders) instead of the Python standard library's source
    """
    from tenfold.demo import demo as run

    _print_report(run(out, data or ["stdlib"], resume), out, json)


@app.command
def train(
    *,
    out: Path,
    settings: Annotated[TrainSettings, Flat] = TrainSettings(),  # noqa: B008
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Train one model, and save it as a Hugging Face directory.

    Settings may also come from a TOML file, named with --config FILE.

    Parameters
    ----------
    out
        folder of the run
    """
    from tenfold.train import train as run

    result = run(settings, out, resume)
    _print_table(result, "trained", json)


@app.command
def compare(
    *,
    out: Path,
    settings: Annotated[TrainSettings, Flat] = TrainSettings(),  # noqa: B008
    sparse: Path | None = None,
    dense_active: Path | None = None,
    dense_total: Path | None = None,
    resume: Resume = False,
    json: Json = False,
) -> None:
    """Train, or take trained, a sparse model and its two dense twins; report on three axes.

    Settings may also come from a TOML file, named with --config FILE.

    Parameters
    ----------
    out
        folder for what is trained here, report.html and report.json
    sparse
        folder of a finished sparse run to take
    dense_active
        folder of a finished run of its equal-active twin
    dense_total
        folder of a finished run of its equal-total twin
    """
    from tenfold.compare import compare as run

    folders = {"sparse": sparse, "dense_active": dense_active, "dense_total": dense_total}
    taken = {name: folder for name, folder in folders.items() if folder is not None}
    _print_report(run(settings, out, resume, taken), out, json)


@app.command
def generate(
    model: str,
    /,
    *,
    prompt: str = "",
    params: Annotated[SamplingParams, Flat] = SamplingParams(),  # noqa: B008
    memory: Memory = None,
    warm: Warm = None,
    json: Json = False,
) -> None:
    """Write text with a model.

    Parameters
    ----------
    model
        directory or GGUF file of a model, or its id on the Hugging Face hub (owner/name)
    prompt
        text to go on from
    """
    from tenfold.engine.generation import load_generation

    _print_generation(load_generation(model, prompt, params, Budget(memory, warm)), json)


@app.command
def chat(
    model: str,
    /,
    *,
    system: str | None = None,
    message: str | None = None,
    params: Annotated[SamplingParams, Flat] = SamplingParams(),  # noqa: B008
    memory: Memory = None,
    warm: Warm = None,
    context: Context = 4096,
    json: Json = False,
) -> None:
    """Talk with a model that was trained to chat.

    Answers are written as they come; Ctrl-C stops one. /reset begins anew, /exit or Ctrl-D ends.

    Parameters
    ----------
    model
        directory of a model, a .gguf file, or an id on the Hugging Face hub (owner/name)
    system
        what the model is told before the conversation
    message
        say this, print the answer and end
    context
        tokens of conversation that a memory budget makes room for
    """
    from tenfold.chat import load_chat, talk

    if json and message is None:
        raise TenfoldError("--json needs --message: a conversation is no single object")
    conversation = load_chat(model, params, system, Budget(memory, warm), context)
    if message is None:
        talk(conversation)
    else:
        _print_generation(conversation.answer(message), json)


@app.command
def pack(
    model: str,
    /,
    *,
    out: Out,
    experts: ExpertsFormat = "q4",
    rest: RestFormat = "q8",
    calibrate: Path | None = None,
    json: Json = False,
) -> None:
    """Shrink a model, and lay it out for running.

    After an interruption, the same command goes on where it was.

    Parameters
    ----------
    model
        directory or GGUF file of a model, or its id on the Hugging Face hub (owner/name)
    out
        directory to make
    experts
        format of the routed experts
    rest
        format of every other matrix
    calibrate
        text file that the whole model reads first, to round with most care what its inputs use most
    """
    from tenfold.checkpoint.pack.packing import pack as run

    _print_table(run(model, out, Packing(experts=experts, rest=rest), calibrate), "packed", json)


@app.command
def unpack(
    model: str,
    /,
    *,
    out: Out,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    json: Json = False,
) -> None:
    """Turn a packed model back into a plain Hugging Face checkpoint.

    Parameters
    ----------
    model
        directory of a packed model
    out
        directory to make
    dtype
        of the weights that are written
    """
    import torch

    from tenfold.checkpoint.pack.unpack import unpack as run

    family = run(model, out, getattr(torch, dtype))
    _print_table({"out": str(out), "architecture": family.architecture, "dtype": dtype}, "unpacked", json)


@app.command
def inspect(
    model: str,
    /,
    *,
    context: Context = 4096,
    verify: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Count a model's parameters, FLOPs and bytes, and what its files hold.

    Parameters
    ----------
    model
        a preset, the directory or GGUF file of a model, or its id on the Hugging Face hub (owner/name)
    context
        positions a token attends to, for the FLOPs
    verify
        read a packed model whole, and check every record against its checksum
    """
    from tenfold.inspection import inspect as run
    from tenfold.inspection import tables

    found = run(model, context, verify)
    if json:
        print(json_.dumps(found))
        return
    from rich.console import Console

    Console().print(*tables(found, model), sep="")


@app.command
def bench(
    model: str | None = None,
    /,
    *,
    settings: Annotated[BenchSettings, Flat] = BenchSettings(),  # noqa: B008
    json: Json = False,
) -> None:
    """Measure this machine's ceilings, and a model's prefill and decode against them.

    Parameters
    ----------
    model
        directory or GGUF file of a model, or its id on the Hugging Face hub (owner/name)
    """
    from tenfold.bench import bench as run

    found = run(model, settings)
    if json:
        print(json_.dumps(found))
        return
    from rich.console import Console

    from tenfold.bench.table import report

    Console().print(report(found))


@app.command(name="eval")
def evaluate(
    model: str,
    /,
    *,
    settings: Annotated[EvalSettings, Flat] = EvalSettings(),  # noqa: B008
    memory: Memory = None,
    warm: Warm = None,
    json: Json = False,
) -> None:
    """Ask a model lm-eval's tasks, or how well it predicts a text.

    Parameters
    ----------
    model
        directory or GGUF file of a model, or its id on the Hugging Face hub (owner/name)
    """
    from tenfold.evaluate import evaluate as run

    found = run(model, settings, Budget(memory, warm))
    if json or settings.perplexity is not None:
        _print_table(found, "evaluated", json)
        return
    from rich.console import Console

    from tenfold.evaluate.table import table

    Console().print(table(found))


@app.command
def serve(
    model: str,
    /,
    *,
    settings: Annotated[ServeSettings, Flat] = ServeSettings(),  # noqa: B008
    memory: Memory = None,
    warm: Warm = None,
) -> None:
    """Serve a model to many users at once: OpenAI's API, and a page to talk with it.

    Ctrl-C lets running requests end; another ends at once.

    Parameters
    ----------
    model
        directory of a model, a .gguf file, or an id on the Hugging Face hub (owner/name)
    """
    from tenfold.server.serve import open_engine
    from tenfold.server.serve import serve as run

    run(lambda: open_engine(model, Budget(memory, warm), settings), settings)


@app.command
def trace(
    model: str,
    /,
    *,
    data: Annotated[list[str] | None, Parameter(negative="")] = None,
    tokens: Tokens = 2048,
    out: Annotated[Path | None, Parameter(name=("--out", "-o"))] = None,
    plot: Path | None = None,
    json: Json = False,
) -> None:
    """Record which experts each token chooses, and see how few of them memory must hold.

    Parameters
    ----------
    model
        directory or GGUF file of a model, or its id on the Hugging Face hub (owner/name); without --data,
        a trace that was recorded before
    data
        text for the model to read: files, folders, stdlib or hf:NAME; each is a kind of its own
    tokens
        tokens to read, of all kinds of text together
    out
        file for the trace
    plot
        .svg file to draw it in
    """
    from tenfold.trace import trace as run

    found = run(model, data or [], tokens, out, plot)
    if json:
        print(json_.dumps(found))
        return
    from rich.console import Console

    from tenfold.trace.table import table

    Console().print(table(found))


def _print_generation(generation: "Generation", json: bool) -> None:
    if json:
        print(json_.dumps(generation.finish().summary(), ensure_ascii=False))
        return
    for piece in generation:
        print(piece, end="", flush=True)
    print(flush=True)
    for line in filter(None, (generation.usage.plan, generation.usage.line())):
        print(f"({line})", file=sys.stderr)


def _print_report(report: dict[str, Any], out: Path, json: bool) -> None:
    if json:
        print(json_.dumps(report))
        return
    from rich.console import Console

    console = Console()
    for axis, sentence in report["verdicts"].items():
        console.print(f"[bold]{axis}[/bold]: {sentence}\n", highlight=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False)


def _print_table(values: dict[str, Any], title: str, json: bool) -> None:
    """Scalars, and dicts of scalars, one a row."""
    if json:
        print(json_.dumps(values))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", overflow="fold")
    for name, value in values.items():
        if isinstance(value, dict):
            for part, number in value.items():
                table.add_row(f"{name} ({part})", _cell(number))
        elif not isinstance(value, list):
            table.add_row(name, _cell(value))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _use_config_file(arguments: list[str]) -> list[str]:
    """Take `--config FILE` out: its TOML fills in what the command line leaves open."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    app.config = []
    if "--config" not in arguments:
        return arguments
    at = arguments.index("--config")
    if at + 1 == len(arguments) or not Path(arguments[at + 1]).is_file():
        raise TenfoldError("--config: name a TOML file that is there")
    app.config = [_toml(arguments[at + 1])]
    return arguments[:at] + arguments[at + 2 :]


def _toml(file: str) -> cyclopts.config.Toml:
    import tomllib

    try:
        tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise TenfoldError(f"{file}: not TOML ({error})") from None
    return cyclopts.config.Toml(file, use_commands_as_keys=False)


def main() -> None:
    """Run the command line. Exit status 2 for bad input, 130 after Ctrl-C."""
    try:
        app(_use_config_file(sys.argv[1:]), exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (TenfoldError, cyclopts.CycloptsError, OSError) as error:
        print(f"tenfold: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"tenfold: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)


def _one_line(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return first_problem(cause)
    return " ".join(str(error).split())
