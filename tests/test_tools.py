"""Calls as models write them, and what they may be led to write instead."""

import json

import pytest

from tenfold.chat_template import ChatTemplate
from tenfold.server.reply import Part
from tenfold.server.tools import NOTATIONS, Dialect

PARAMETERS = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
HERMES, DEEPSEEK = "<tool_call>", "<｜tool▁calls▁begin｜>"
BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def read(marker: str, text: str, parameters: object = PARAMETERS) -> list[Part]:
    reader = Dialect(ChatTemplate({"default": marker}, "toy")).reader("", {"weather": parameters})  # type: ignore[dict-item]
    return [*reader.feed(text), *reader.finish()]


CALLS = {
    "Qwen3-Coder": (
        HERMES,
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        {"city": "Rome\n", "days": 2},
    ),
    "GLM-4.5": (
        HERMES,
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        {"city": "Rome", "days": 2},
    ),
    "DeepSeek-V3": (
        DEEPSEEK,
        f'{DEEPSEEK}{BEGIN}function{SEP}weather\n```json\n{{"days": 2}}\n```{END}<｜tool▁calls▁end｜>',
        {"days": 2},
    ),
    "DeepSeek-V3.1": (DEEPSEEK, f'{DEEPSEEK}{BEGIN}weather{SEP}{{"days": 2}} {END}', {"days": 2}),
}


@pytest.mark.parametrize(("marker", "text", "arguments"), CALLS.values(), ids=CALLS)
def test_a_call(marker: str, text: str, arguments: object) -> None:
    (part,) = read(marker, text)
    assert (part.kind, part.name, json.loads(part.text)) == ("call", "weather", arguments)


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        (HERMES, "<tool_call><function=weather>" + "<parameter=a>" * 9999),
        (HERMES, "<tool_call>weather\n" + "<arg_key>a</arg_key>\n<arg_value>" * 9999),
        (DEEPSEEK, f"{DEEPSEEK}{BEGIN}weather{SEP}" + " " * 999_999 + "x" + BEGIN[:-1]),
        *((n.marker, n.opening + " \n" * 99_999 + '{"' * 99_999 + "}" * 99_999 + "x") for n in NOTATIONS),
    ],
    ids=lambda value: value[:40],
)
def test_what_never_ends_is_read_at_once(marker: str, text: str) -> None:
    """A model can be made to write anything, and it is read in the event loop."""
    assert len(read(marker, text)) < 9


def test_a_schema_that_is_none() -> None:
    (part,) = read(HERMES, CALLS["GLM-4.5"][1], {"properties": [1]})
    assert json.loads(part.text) == {"city": "Rome", "days": 2}
