"""Whatever a model would rather say, its text matches; whatever a client sends, an answer comes soon."""

import io
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from texts import TEXTS
from tokenizers import decoders, models

from tenfold.engine.constraint import Matcher, compile_constraint
from tenfold.engine.request import Constraint
from tenfold.engine.sampler import Sampler
from tenfold.errors import TenfoldError
from tenfold.sampling import SamplingParams
from tenfold.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe

ALPHABET = ['{}[]":,.0123456789 abcdef null true false foo bar x ( ) - _', *TEXTS]
ROWS = 9
"""That the model has besides its tokens."""


def byte_level(_: Path) -> Tokenizer:
    return Tokenizer(train_bpe(iter(ALPHABET), 350), {"eos_token": END_OF_TEXT})


def sentencepiece(**options: Any) -> Callable[[Path], Tokenizer]:
    def load(folder: Path) -> Tokenizer:
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(ALPHABET * 5),
            model_writer=model,
            vocab_size=420,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=3,
            byte_fallback=True,
            **options,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        return load_tokenizer(folder)

    return load


def like_llamas(_: Path) -> Tokenizer:
    """A tokenizer.json with SentencePiece's spelling."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*'▁0123456789abcfor{}[]",:()', "▁foo", "foo", "▁x", '▁"', "▁▁", '":']
    raw = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(raw, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})


KINDS = {
    "byte-level": byte_level,
    "like Llama's, tokenizer.json": like_llamas,
    "like Llama's": sentencepiece(
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False
    ),
    "like Gemma's": sentencepiece(
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["▁▁", "\n\n"],
    ),
    "unigram": sentencepiece(model_type="unigram"),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return byte_level(Path())


def compiled(tokenizer: Tokenizer, kind: str, text: object, ends: tuple[int, ...] | None = None) -> Matcher:
    constraint = Constraint(kind, text if isinstance(text, str) else json.dumps(text))
    size = tokenizer.vocab_size + ROWS
    return compile_constraint(constraint, tokenizer, size, tokenizer.eos_token_ids if ends is None else ends)


def written(tokenizer: Tokenizer, matcher: Matcher, seed: int, most: int = 600, **params: Any) -> str | None:
    """What a model without any sense writes; None where it comes to no end."""
    ends, generator = tokenizer.eos_token_ids, torch.Generator().manual_seed(seed)
    sampler, tokens = Sampler(SamplingParams(seed=seed, **params), (1, 2), 0, matcher.copy()), []
    for _ in range(most):
        token = sampler(torch.randn(tokenizer.vocab_size + ROWS, generator=generator) * 3)
        if token in ends:
            return tokenizer.decode(tokens)
        tokens.append(token)
        if sampler.done:
            return tokenizer.decode(tokens)
    return None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"c', "☕"]}, "minItems": 1, "maxItems": 3},
        "child": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    return _is_person(json.loads(text))


def _is_person(value: Any) -> bool:
    return (
        {"name", "age", "tags"} <= value.keys() <= PERSON["properties"].keys()
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", 'b"c', "☕"}
        and (value.get("child") is None or _is_person(value["child"]))
    )


def is_nested(text: str) -> bool:
    while text.startswith("("):
        text = text.removeprefix("(").removesuffix(")")
    return re.fullmatch("[0-9]{1,3}", text) is not None


def matches(pattern: str) -> tuple[str, str, Callable[[str], bool]]:
    return "regex", pattern, lambda text: re.fullmatch(pattern, text) is not None


CONSTRAINTS = [
    ("json_schema", PERSON, is_person),
    ("grammar", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/', is_nested),
    matches(r"(foo|bar)[0-9]{1,3}( x)?"),
    matches(r"[a-zé☕ ]{1,6}"),
    matches(r"( |_)*foo"),
    matches(r"( foo|x)"),
]


@pytest.mark.parametrize(("kind", "text", "valid"), CONSTRAINTS, ids=[str(c[1])[:20] for c in CONSTRAINTS])
def test_random_logits_give_text_that_matches(
    tokenizer: Tokenizer, kind: str, text: object, valid: Callable[[str], bool]
) -> None:
    matcher = compiled(tokenizer, kind, text)
    texts = [written(tokenizer, matcher, seed) for seed in range(12)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 6
    assert all(map(valid, ended)), ended


LEAVES = st.sampled_from(
    [
        ({"type": "boolean"}, lambda v: isinstance(v, bool)),
        ({"type": "null"}, lambda v: v is None),
        ({"enum": ["a", 1, None]}, lambda v: v in ("a", 1, None)),
        ({"type": "string", "pattern": "^[ab]{1,4}$"}, lambda v: re.fullmatch("[ab]{1,4}", v)),
        ({"type": "integer", "minimum": -3, "maximum": 12}, lambda v: isinstance(v, int) and -3 <= v <= 12),
    ]
)


def _array(part: Any) -> Any:
    schema, valid = part
    return (
        {"type": "array", "items": schema, "maxItems": 2},
        lambda v: isinstance(v, list) and len(v) < 3 and all(map(valid, v)),
    )


def _object(parts: Any) -> Any:
    names = [f"k{i}" for i in range(len(parts))]
    schema = {
        "type": "object",
        "properties": {name: part[0] for name, part in zip(names, parts, strict=True)},
        "required": names[::2],
        "additionalProperties": False,
    }
    return (
        schema,
        lambda v: (
            set(names[::2]) <= v.keys() <= set(names) and all(parts[int(k[1:])][1](x) for k, x in v.items())
        ),
    )


SCHEMAS = st.recursive(
    LEAVES, lambda part: part.map(_array) | st.lists(part, min_size=1, max_size=3).map(_object), max_leaves=6
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS, st.integers(0, 99), st.sampled_from([{}, {"temperature": 0}, {"top_p": 0.5, "top_k": 20}]))
def test_any_schema(plain: Tokenizer, case: Any, seed: int, params: dict[str, Any]) -> None:
    schema, valid = case
    text = written(plain, compiled(plain, "json_schema", schema), seed, **params)
    assert text is not None
    assert valid(json.loads(text)), text


def test_neither_bias_nor_penalties_lead_off_it(plain: Tokenizer) -> None:
    wrong = str(plain.encode("x")[0])
    matcher = compiled(plain, "regex", "[ab]{5}")
    params = {"logit_bias": {wrong: 100}, "repetition_penalty": 100, "presence_penalty": -2, "temperature": 0}
    assert re.fullmatch("[ab]{5}", written(plain, matcher, 0, **params))


def test_at_the_end_only_an_end_is_left(plain: Tokenizer) -> None:
    digit, end = plain.encode("7")[0], plain.eos_token_ids[0]
    matcher = compiled(plain, "regex", "[0-9]{1,2}")
    assert not matcher.mask()[end]
    matcher.advance(digit)
    assert matcher.complete
    assert not matcher.done
    assert matcher.mask()[end]
    assert matcher.mask()[digit]
    other = matcher.copy()
    matcher.advance(digit)
    assert matcher.done
    assert matcher.mask().nonzero()[0].tolist() == [end]
    matcher.advance(end)
    assert not other.done
    with pytest.raises(TenfoldError, match="cannot be followed"):
        other.advance(plain.encode("x")[0])


def test_a_model_that_has_no_end_is_done(plain: Tokenizer) -> None:
    matcher = compiled(plain, "regex", "[0-9]{2}", ends=())
    assert not matcher.mask()[list(plain.eos_token_ids)].any()
    assert re.fullmatch("[0-9]{2}", written(plain, matcher, 0))


def test_a_stop_token_ends_only_what_is_complete(plain: Tokenizer) -> None:
    seven = plain.encode("7")[0]
    matcher = compiled(plain, "regex", "[0-9]{2}", ends=(seven,))
    assert not matcher.mask()[seven]
    for _ in range(2):
        matcher.advance(plain.encode("8")[0])
    assert matcher.mask().nonzero()[0].tolist() == [seven]


NOTHING = [
    ("json_schema", False),
    ("json_schema", {"enum": []}),
    ("json_schema", {"type": "string", "minLength": 3, "maxLength": 2}),
    ("json_schema", {"$ref": "#"}),
    ("json_schema", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
    ("json_schema", {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
    (
        "json_schema",
        {
            "$defs": {
                "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"$ref": "#/$defs/c"}]},
                "b": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]},
                "c": {"type": "array", "prefixItems": [{"$ref": "#/$defs/a"}], "minItems": 1},
            },
            "$ref": "#/$defs/a",
        },
    ),
    ("regex", r"[^\s\S]"),
]


@pytest.mark.parametrize(("kind", "text"), NOTHING, ids=str)
def test_what_nothing_can_match_is_refused(plain: Tokenizer, kind: str, text: object) -> None:
    with pytest.raises(TenfoldError):
        compiled(plain, kind, text)


def test_what_may_contain_itself_is_not_refused(plain: Tokenizer) -> None:
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["next"],
            }
        },
        "$ref": "#/$defs/node",
    }
    assert compiled(plain, "json_schema", tree).mask().any()


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", "[1", "EOF"),
        ("json_schema", "\ud800", "json_schema"),
        ("json_schema", {"type": "foo"}, "Invalid type"),
        ("json_schema", {"not": {"type": "string"}}, "not"),
        ("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000, "recursion"),
        ("json_schema", {"enum": [f"{i:09}" for i in range(9000)]}, "32768 at most"),
        ("json_schema", {"type": "integer", "multipleOf": 1000003}, "more than"),
        (
            "json_schema",
            {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(30)]},
            "more than",
        ),
        ("regex", "a{3", "regex"),
        ("regex", "(" * 5000 + "a" + ")" * 5000, "regex"),
        ("regex", "a*" * 2000 + "b", "limit"),
        ("grammar", "start: foo", "unknown name"),
        (
            "grammar",
            "start: R0\n" + "".join(f"R{i}: R{i + 1}\n" for i in range(2000)) + 'R2000: "a"',
            "deeply",
        ),
        ("grammar", "start: " + " ".join(['"a"?'] * 3000), "oo many items"),
        ("grammar", "start: A\nA: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(40)), "more than"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hostile_constraints_end_in_a_line(plain: Tokenizer, kind: str, text: object, words: str) -> None:
    with pytest.raises(TenfoldError, match=words) as error:
        compiled(plain, kind, text)
    assert len(str(error.value)) < 700
    assert written(plain, compiled(plain, "regex", "ab"), 0) == "ab"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(((x{1,1000}){1,1000}){1,1000}){1,1000}"),
        ("regex", r"\w{1000}\p{L}{1000}"),
        ("regex", "(?s)(.{1,1000}a){1,1000}"),
        ("grammar", 'start: s\ns: s s | "a" | s s s | '),
        ("grammar", 'start: ("a"{1,1000}){1,1000}'),
        ("grammar", 'start: "a" start'),
        ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1} r{i + 1}\n" for i in range(60)) + 'r60: "a"'),
        ("grammar", "start: A\nA: ~/(a|b)*a(a|b){25}/"),
        (
            "json_schema",
            {"type": "array", "items": {"maxLength": 10**5}, "minItems": 10**9},
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_becomes_too_hard_on_the_way_ends_there(plain: Tokenizer, kind: str, text: object) -> None:
    try:
        written(plain, compiled(plain, kind, text), 0, most=100)
    except TenfoldError as error:
        assert "cannot be followed" in str(error)


def test_nothing_is_fetched(plain: Tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        with pytest.raises(TenfoldError, match="retriev"):
            compiled(plain, "json_schema", {"$ref": f"http://127.0.0.1:{server.getsockname()[1]}/schema"})
        with pytest.raises(BlockingIOError):
            server.accept()
