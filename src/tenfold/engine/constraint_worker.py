"""The process that tries constraints first: a JSON line in, a JSON line out, until its input ends.

llguidance bounds most of what it does, but not all: small grammars overflow its stack, intersections of
patterns take it minutes. What this process gets done within its limits, the engine's can do too: most of the
time does not depend on the vocabulary, which here is that of bytes.

Started by constraint.py as a script, with its limits as arguments; it imports nothing of tenfold.
"""

import json
import re
import resource
import signal
import sys
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

STACK_BYTES = 1 << 20
"""Less than threads have, so that what fits here fits there."""
LIMITS = LLParserLimits(
    max_items_in_row=1000,  # 2,000 took up to 0.3 s a token
    step_max_items=20_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
# Or a text may be nothing but spaces, which models that are not sure of themselves like to write.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,40}"


def new_matcher(vocabulary: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """It may be in an error. Raises ValueError for what is not JSON."""
    if kind == "json_schema":
        grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        grammar = LLMatcher.grammar_from_lark(text)
    return LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)


def problem(matcher: LLMatcher) -> str | None:
    """What keeps it from going on, or from ending well."""
    if matcher.is_error():
        return next(iter(matcher.get_error().splitlines()), "") or "nothing can follow"
    return "no text can match it" if matcher.is_stopped() and not matcher.is_accepting() else None


def trial(vocabulary: LLTokenizer, kind: str, text: str) -> str | None:
    """What is wrong with a constraint."""
    if kind == "grammar":  # a model's special tokens are not known here: one that is stands for them
        text = re.sub(r"<\|[^|<>\s]*\|>", "<|tool|>", text)
    try:
        matcher = new_matcher(vocabulary, kind, text)
    except ValueError as error:
        return str(error)
    matcher.compute_bitmask()
    if found := problem(matcher):
        return found
    if kind == "json_schema" and endless(json.loads(text)):
        return "no text can match it: something in it must contain itself"
    return None


def endless(schema: Any) -> bool:
    """Whether whatever matches would have to be nested without end, by references that come back.

    In doubt it is not: keywords that this does not know only make a schema harder to match.
    """
    targets = {ref: _target(schema, ref) for ref in _references(schema)}
    ends = {ref for ref, target in targets.items() if target is None}
    while new := {ref for ref in targets.keys() - ends if _can_end(targets[ref], ends)}:
        ends |= new
    return not _can_end(schema, ends)


def _references(schema: Any) -> list[str]:
    found, left = [], [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            if isinstance(value.get("$ref"), str):
                found.append(value["$ref"])
        elif isinstance(value, list):
            left += value
    return found


def _target(schema: Any, ref: str) -> Any:
    """None for one that is not a path from the root."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    for step in unquote(ref).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        try:
            schema = schema[int(step) if isinstance(schema, list) else step]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return schema


def _can_end(schema: Any, ends: set[str]) -> bool:
    """Whether something finite may match, if what the references in `ends` name can be finite."""
    if not isinstance(schema, dict):
        return True

    def can(part: Any) -> bool:
        return _can_end(part, ends)

    def parts(keyword: str) -> list[Any]:
        found = schema.get(keyword)
        return found if isinstance(found, list) else []

    ref, kind, count = schema.get("$ref"), schema.get("type"), schema.get("minItems", 0)
    needed = parts("allOf")
    if kind in ("object", ["object"]):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        needed = [*needed, *(properties.get(name, others) for name in parts("required"))]
    if kind in ("array", ["array"]) and isinstance(count, int) and count:
        first = parts("prefixItems")
        needed = [*needed, *first[:count], *([schema.get("items")] if count > len(first) else [])]
    choices = [parts(keyword) for keyword in ("anyOf", "oneOf") if parts(keyword)]
    return (
        (not isinstance(ref, str) or ref in ends)
        and all(map(can, needed))
        and all(any(map(can, choice)) for choice in choices)
    )


def main(seconds: int, megabytes: int) -> None:
    for limit, size in ((resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_STACK, STACK_BYTES)):
        with suppress(ValueError, OSError):  # macOS has these limits and may refuse to set them
            resource.setrlimit(limit, (size, size))
    vocabulary = LLTokenizer("byte")
    for request in sys.stdin:
        # Of processor time. Python is not asked when it runs out: the signal ends the process.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        error = trial(vocabulary, *json.loads(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
