"""How models say calls of tools and reasoning: found out from the chat template.

A call that a client requires is forced: the answer is begun in the model's own notation, up to the name of
the tool, and a grammar leads the rest.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic_core import from_json

from tenfold.chat_template import ChatTemplate
from tenfold.engine.request import Constraint
from tenfold.server.asking import schema_text
from tenfold.server.reply import Harmony, Marked, Part, Plain, Reader, Thinking, Whole

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schemas of parameters, by the tool's name."""


@dataclass(frozen=True)
class Notation:
    """Of a call. `before` and `after` its arguments are Lark, NAME the tool's name."""

    marker: str
    """In a template it says that this is the notation."""
    opening: str
    before: str
    after: str
    reader: Callable[[Schemas], Reader]


def _json_calls(text: str) -> list[Part] | None:
    """One JSON object or a list of them: name, and arguments or parameters."""
    try:
        found = from_json(text)
    except ValueError:
        return None
    calls = found if isinstance(found, list) else [found]
    parts = [_json_call(call) for call in calls]
    return None if not parts or None in parts else [part for part in parts if part]


def _json_call(call: Any) -> Part | None:
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return Part("call", arguments if isinstance(arguments, str) else _dump(arguments), name)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_GLM = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_CODER = ("<parameter=", ">", "", "</parameter>")


def _hermes(text: str, schemas: Schemas) -> list[Part] | None:
    """Qwen, Hermes: JSON. GLM-4.5: <arg_key>; Qwen3-Coder: <parameter=…>."""
    for name, marks in (
        (r"\s*([\w.-]+)\s*(?=<arg_key>|$)", _GLM),
        (r"\s*<function=([\w.-]+)>", _CODER),
    ):
        if found := re.match(name, text):
            types = schemas.get(found[1], {}).get("properties", {})
            pairs = _pairs(text[found.end() :], marks)
            arguments = {key: _typed(value, types.get(key)) for key, value in pairs}
            return [Part("call", _dump(arguments), found[1])]
    return _json_calls(text)


def _pairs(text: str, marks: tuple[str, str, str, str]) -> list[tuple[str, str]]:
    """What stands between the first two marks, and between the others. What a model writes may be hostile
    too: nothing is read twice."""
    found: list[tuple[str, str]] = []
    at = 0
    while True:
        pair: list[str] = []
        for opening, closing in (marks[:2], marks[2:]):
            start = text.find(opening, at)
            end = text.find(closing, start + len(opening)) if start >= 0 else -1
            if end < 0:
                return found
            pair.append(text[start + len(opening) : end])
            at = end + len(closing)
        found.append((pair[0].strip(), pair[1].removeprefix("\n").removesuffix("\n")))


def _typed(text: str, schema: Any) -> Any:
    """An argument that is written without quotes."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return from_json(text)
    except ValueError:
        return text


def _mistral(text: str) -> list[Part] | None:
    """A list after the marker, or in newer ones NAME[ARGS]{…} after each."""
    if text.lstrip().startswith("["):
        return _json_calls(text)
    calls = [
        re.fullmatch(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(\{.*\})\s*", call, re.DOTALL)
        for call in text.split("[TOOL_CALLS]")
    ]
    return [Part("call", call[2], call[1]) for call in calls if call] if all(calls) else None


def _deepseek(text: str) -> list[Part] | None:
    """V3 and R1 write a fenced block after the name, V3.1 another separator."""
    parts = []
    for call in text.split("<｜tool▁call▁begin｜>")[1:]:
        said = call.partition("<｜tool▁call▁end｜>")[0].removeprefix("function<｜tool▁sep｜>")
        middle = "<｜tool▁sep｜>" if "<｜tool▁sep｜>" in said else "\n```json\n"
        name, _, arguments = said.partition(middle)
        if not re.fullmatch(r"[\w.-]+", name):
            return None
        parts.append(Part("call", arguments.strip().removesuffix("```").rstrip(), name))
    return parts or None


def _llama(text: str) -> list[Part] | None:
    return _json_calls(text.strip().removeprefix("<|python_tag|>"))


LLAMA = Notation(
    marker="<|python_tag|>",
    opening="",
    before=r'"{\"name\": \"NAME\", \"parameters\": "',
    after='"}"',
    reader=lambda _: Whole(["{", "<|python_tag|>"], _llama),
)
NOTATIONS = (
    Notation(
        marker="<|channel|>",
        opening="<|channel|>commentary to=functions.",
        before='"NAME" <|message|>',
        after='""',
        reader=lambda _: Harmony(lambda name, arguments: Part("call", arguments.strip(), name)),
    ),
    Notation(
        marker="<｜tool▁calls▁begin｜>",
        opening="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        before=r'"NAME\n```json\n"',
        after=r'"\n```"',
        reader=lambda _: Marked("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _deepseek),
    ),
    Notation(
        marker="[TOOL_CALLS]",
        opening="[TOOL_CALLS]",
        before=r'"[{\"name\": \"NAME\", \"arguments\": "',
        after='"}]"',
        reader=lambda _: Marked("[TOOL_CALLS]", None, _mistral),
    ),
    Notation(
        marker="<tool_call>",
        opening="<tool_call>\n",
        before=r'"{\"name\": \"NAME\", \"arguments\": "',
        after='"}"',
        reader=lambda schemas: Marked("<tool_call>", "</tool_call>", partial(_hermes, schemas=schemas)),
    ),
    LLAMA,
)
HARMONY = NOTATIONS[0]


class Dialect:
    """Of one model, by its chat template."""

    def __init__(self, template: ChatTemplate) -> None:
        text = "\n".join(template.templates.values())
        self.notation = next((n for n in NOTATIONS if n.marker in text), LLAMA)
        self.knows_tools = "tools" in text
        self.knows_developers = "developer" in text
        self._thinks = "</think>" in text
        # A few templates write arguments as they are; most want an object that they write as JSON.
        self.arguments_as_text = bool(re.search(r"arguments(['\"]\])?\s*(\+|-?\}\})", text))

    def reader(self, prompt: str, schemas: Schemas) -> Reader:
        """For an answer to `prompt`. Without tools nothing is a call."""
        if self.notation is HARMONY:
            return HARMONY.reader(schemas)
        reader = self.notation.reader(schemas) if schemas else Plain()
        if self._thinks:
            reader = Thinking(reader, inside=self._begins_thinking(prompt))
        return reader

    def _begins_thinking(self, prompt: str) -> bool:
        return self._thinks and prompt.rstrip().endswith("<think>")

    def before_answer(self, prompt: str) -> str:
        """What must be said between `prompt` and an answer that has no room for reasoning."""
        if self.notation is HARMONY:
            return ""
        return "\n</think>\n\n" if self._begins_thinking(prompt) else ""

    def before_content(self, prompt: str) -> str:
        """The same, where the answer is content."""
        return "<|channel|>final<|message|>" if self.notation is HARMONY else self.before_answer(prompt)

    def forced(self, prompt: str, schemas: Schemas) -> tuple[str, Constraint]:
        """The beginning of an answer that must be a call of one of these tools, and what leads the rest."""
        opening = self.before_answer(prompt) + self.notation.opening
        return opening, Constraint("grammar", _grammar(self.notation, schemas))


def _grammar(notation: Notation, schemas: Schemas) -> str:
    rules = [f"start: {' | '.join(f'call_{i}' for i in range(len(schemas)))}"]
    for number, (name, schema) in enumerate(schemas.items()):
        before = notation.before.replace("NAME", name)
        rules.append(f"call_{number}: {before} arguments_{number} {notation.after}")
        rules.append(f"arguments_{number}: %json {schema_text({'type': 'object', **schema})}")
    return "\n".join(rules)


def schemas_of(tools: Sequence[Any]) -> Schemas:
    return {tool.function.name: tool.function.parameters or {} for tool in tools}
