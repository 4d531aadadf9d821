"""The process that renders chat templates: a JSON line in, a JSON line out, until its input ends.

Started by chat_template.py as a script, with its limits as arguments; it imports nothing of tenfold.
What templates may use is what transformers gives them, so that they render the same.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_ERROR = 500  # characters: an error may quote all of what it is about


class Sandbox(ImmutableSandboxedEnvironment):
    """What Jinja takes for unsafe is an error at once, not only where its value is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"{attribute} of a {type(obj).__name__} is not for templates")


class GenerationTag(Extension):
    """`{% generation %}` marks what the model wrote, for training; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return caller()


def raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def strftime_now(format: str) -> str:  # noqa: A002 (templates may name it)
    return datetime.now().strftime(format)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes what HTML would read as markup."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def compiled(template: str) -> Template:
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any], megachars: int) -> str:
    pieces, left = [], megachars << 20
    for piece in compiled(template).generate(variables):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise TemplateError(f"it writes more than {megachars} million characters")
    return "".join(pieces)


def answer(request: str, megabytes: int, megachars: int) -> str:
    """A JSON object with the `text`, or with the `error` that kept it from being written."""
    try:
        return json.dumps({"text": render(**json.loads(request), megachars=megachars)})
    except MemoryError:
        error = f"it needs more than {megabytes} MB of memory"
    except RecursionError:
        error = "it calls itself without end"
    except TemplateSyntaxError as problem:
        error = f"line {problem.lineno}: {problem.message}"
    except Exception as problem:  # whatever the template made Python say
        error = str(problem) or type(problem).__name__
    return json.dumps({"error": error[:LONGEST_ERROR]})


def main(seconds: int, megabytes: int, megachars: int) -> None:
    with suppress(ValueError, OSError):  # macOS has the limit and may refuse to set it
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    for request in sys.stdin:
        # Of processor time. Python is not asked when it runs out: the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        line = answer(request, megabytes, megachars)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(line, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
