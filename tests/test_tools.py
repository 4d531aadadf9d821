"""Calls of tools and reasoning in the notations of models, however their text is cut into pieces."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tenfold.chat_template import ChatTemplate
from tenfold.engine.constraint import compile_constraint
from tenfold.engine.request import Constraint
from tenfold.errors import TenfoldError
from tenfold.server.tools import Dialect
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, train_bpe

TEMPLATES = {
    file.stem: file.read_text() for file in sorted((Path(__file__).parent / "chat_templates").iterdir())
}
TEMPLATES["glm"] = TEMPLATES["coder"] = "{{ tools }} <tool_call> </think>"
PLACE = {
    "type": "object",
    "properties": {"p": {"$ref": "#/$defs/name"}},
    "$defs": {"name": {"type": "string"}},
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
SCHEMAS = {"weather": {**CITY, "required": ["city"], "additionalProperties": False}, "go.to": PLACE}
ROME, OSLO = ("call", "weather", {"city": "Rome"}), ("call", "weather", {"city": "Oslo", "days": 3})
CONTENT, THOUGHT = ("content", "", "Let me see."), ("reasoning", "", "which < city?")
JSON = '{"name": "weather", "arguments": {"city": "Rome"}}'
JSON_2 = '{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}'

ANSWERS = [
    ("chatml", f"Let me see.\n<tool_call>\n{JSON}\n</tool_call>\n<tool_call>{JSON_2}</tool_call>\n",
     [CONTENT, ROME, OSLO]),
    ("chatml", f"<think>\nwhich < city?\n</think>\n\nLet me see.<tool_call>{JSON}", [THOUGHT, CONTENT, ROME]),
    ("chatml", "a <tool_cal b", [("content", "", "a <tool_cal b")]),
    ("chatml", "<tool_call>{nonsense</tool_call>", [("content", "", "<tool_call>{nonsense</tool_call>")]),
    ("glm", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
     "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", [OSLO]),
    ("coder", "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n"
     "</parameter>\n</function>\n</tool_call>", [OSLO]),
    ("mistral", f"[TOOL_CALLS] [{JSON}, {JSON_2}]", [ROME, OSLO]),
    ("mistral", 'Let me see.[TOOL_CALLS]weather[ARGS]{"city": "Rome"}', [CONTENT, ROME]),
    ("llama3", JSON.replace("arguments", "parameters"), [ROME]),
    ("llama3", f"<|python_tag|>{JSON.replace('arguments', 'parameters')}", [ROME]),
    ("llama3", '{"a": 1}', [("content", "", '{"a": 1}')]),
    ("llama3", "Let me see.", [CONTENT]),
    ("deepseek", "Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
     '```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>\n'
     '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "Oslo", "days": 3}\n```'
     "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [CONTENT, ROME, OSLO]),
    ("deepseek", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}'
     "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", [ROME]),
    ("harmony", "<|channel|>analysis<|message|>which < city?<|end|><|start|>assistant<|channel|>commentary"
     ' to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}', [THOUGHT, ROME]),
    ("harmony", "<|channel|>analysis<|message|>which < city?<|end|><|start|>assistant<|channel|>final"
     "<|message|>Let me see.", [THOUGHT, CONTENT]),
]  # fmt: skip


def dialect_of(name: str) -> Dialect:
    return Dialect(ChatTemplate({"default": TEMPLATES[name]}, name))


def read(reader, pieces: list[str]) -> list[tuple[str, str, object]]:
    """Parts, with what belongs together put together."""
    found: list[tuple[str, str, object]] = []
    parts = [part for piece in pieces for part in reader.feed(piece)] + reader.finish()
    for part in parts:
        value = json.loads(part.text) if part.kind == "call" else part.text
        if part.kind != "call" and found and found[-1][0] == part.kind:
            found[-1] = (part.kind, "", f"{found[-1][2]}{value}")
        else:
            found.append((part.kind, part.name, value))
    return found


@pytest.mark.parametrize(("name", "text", "parts"), ANSWERS)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=12))
def test_answers_are_taken_apart_wherever_they_are_cut(
    name: str, text: str, parts: list[object], cuts: list[int]
) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(ends)]
    assert read(dialect_of(name).reader("", SCHEMAS), pieces) == parts


@pytest.mark.parametrize(
    ("name", "start", "more"),
    [
        ("chatml", "<tool_call>weather", "<arg_key>"),
        ("chatml", "<tool_call><function=weather>", "<parameter=a>"),
        ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>", "\n"),
        ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]"),
        ("llama3", "", "{"),
        ("harmony", "<|channel|>final<|message|>", "<|"),
    ],
)
def test_what_a_model_repeats_is_read_once(name: str, start: str, more: str) -> None:
    """A prompt can make it: with the square of a text, this would go on for minutes, and all others wait."""
    reader = dialect_of(name).reader("", SCHEMAS)
    parts = [*reader.feed(start + more * 200_000), *reader.finish()]
    assert {part.kind for part in parts} <= {"content", "call"}


def test_a_prompt_may_begin_the_thoughts() -> None:
    reader = dialect_of("chatml").reader("<|im_start|>assistant\n<think>\n", {})
    assert read(reader, ["which < city?\n</think>\n\nLet me", " see."]) == [THOUGHT, CONTENT]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    raw = train_bpe(iter(["the weather in Rome"] * 9), 300)
    raw.add_special_tokens([AddedToken(text) for text in ("<|message|>", "<|channel|>")])
    return Tokenizer(raw, {"eos_token": END_OF_TEXT})


def accepts(tokenizer: Tokenizer, constraint: Constraint, text: str) -> bool:
    matcher = compile_constraint(constraint, tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    for token in tokenizer.encode(text):
        if not matcher.mask()[token]:
            return False
        matcher.advance(token)
    return matcher.complete


FORCED = {
    "chatml": JSON,
    "mistral": f"[{JSON}]",
    "llama3": JSON.replace("arguments", "parameters"),
    "deepseek": 'weather\n```json\n{"city": "Rome"}\n```',
    "harmony": 'weather<|message|>{"city": "Rome"}',
}


@pytest.mark.parametrize("name", FORCED)
def test_forced_calls_are_what_the_reader_reads(tokenizer: Tokenizer, name: str) -> None:
    dialect, rest = dialect_of(name), FORCED[name]
    opening, constraint = dialect.forced("", SCHEMAS)
    assert accepts(tokenizer, constraint, rest)
    other = rest.replace("weather", "go.to").replace("city", "p")
    assert accepts(tokenizer, constraint, other)
    for wrong in (
        rest.replace("weather", "whether"),
        rest.replace('"Rome"', "7"),
        rest.replace("city", "town"),
    ):
        assert not accepts(tokenizer, constraint, wrong)
    reader = dialect.reader("", SCHEMAS)
    reader.feed(opening)
    assert read(reader, [rest]) == [ROME]


def test_a_schema_that_is_none_is_refused(tokenizer: Tokenizer) -> None:
    _, constraint = dialect_of("chatml").forced("", {"weather": {"properties": {"a": {"type": "colour"}}}})
    with pytest.raises(TenfoldError):
        accepts(tokenizer, constraint, "")
