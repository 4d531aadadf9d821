"""What a model writes, taken apart while it comes: content, reasoning, calls of tools."""

import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol


class Part(NamedTuple):
    """`text` of a call is its arguments, as JSON."""

    kind: Literal["content", "reasoning", "call"]
    text: str
    name: str = ""


Decode = Callable[[str], Sequence[Part] | None]
"""What stands between two markers as calls; None where it is something else."""


class Reader(Protocol):
    def feed(self, text: str) -> list[Part]:
        """What is certain after more text."""
        ...

    def finish(self) -> list[Part]:
        """What is left when the text is over."""
        ...


class Plain:
    """All is content."""

    def feed(self, text: str) -> list[Part]:
        return _content(text)

    def finish(self) -> list[Part]:
        return []


class Marked:
    """Calls stand between two markers, or after the first to the end of the text."""

    def __init__(self, start: str, end: str | None, decode: Decode) -> None:
        self._start, self._end, self._decode = start, end, decode
        self._rest, self._searched, self._inside, self._called = "", 0, False, False

    def feed(self, text: str) -> list[Part]:
        self._rest += text
        parts: list[Part] = []
        while True:
            marker = self._end if self._inside else self._start
            at = -1 if marker is None else self._rest.find(marker, self._searched)
            if marker is None or at < 0:
                break
            before, self._rest, self._searched = self._rest[:at], self._rest[at + len(marker) :], 0
            parts += self._calls(before) if self._inside else _content(before.rstrip())
            self._inside = not self._inside
        if self._inside:
            self._searched = max(0, len(self._rest) - len(self._end or ""))
        else:
            # White space between content and a call is neither's.
            sure = len(self._rest[: len(self._rest) - begun(self._rest, self._start)].rstrip())
            parts += _content(self._rest[:sure])
            self._rest = self._rest[sure:]
        return parts

    def finish(self) -> list[Part]:
        rest, self._rest = self._rest, ""
        if self._inside:
            return self._calls(rest)
        return _content(rest) if rest.strip() or not self._called else []

    def _calls(self, text: str) -> list[Part]:
        calls = self._decode(text)
        if calls is None:
            return _content(self._start + text + (self._end or ""))
        self._called = True
        return list(calls)


class Whole:
    """A text that begins like a call is one from beginning to end, or content."""

    def __init__(self, openings: Sequence[str], decode: Decode) -> None:
        self._openings, self._decode = openings, decode
        self._text, self._content = "", False

    def feed(self, text: str) -> list[Part]:
        if self._content:
            return _content(text)
        self._text += text
        begin = self._text.lstrip()
        if any(begin.startswith(o) or o.startswith(begin) for o in self._openings):
            return []
        self._content, text, self._text = True, self._text, ""
        return _content(text)

    def finish(self) -> list[Part]:
        calls = self._decode(self._text) if self._text.strip() else None
        return _content(self._text) if calls is None else list(calls)


class Thinking:
    """Reasoning between <think> and </think> comes before what `after` reads."""

    def __init__(self, after: Reader, inside: bool) -> None:
        self._after = after
        self._state: Literal["before", "inside", "after"] = "inside" if inside else "before"
        self._rest, self._begun = "", False

    def feed(self, text: str) -> list[Part]:
        if self._state == "after":
            return self._after.feed(self._trim(text))
        self._rest += text
        if self._state == "before":
            begin = self._rest.lstrip()
            if "<think>".startswith(begin) and begin != "<think>":
                return []
            if not begin.startswith("<think>"):
                return self._go_on(self._rest, trim=False)
            self._state, self._rest = "inside", begin.removeprefix("<think>")
        reasoning, marker, answer = self._rest.partition("</think>")
        if marker:
            return self._reasoning(reasoning.rstrip()) + self._go_on(answer, trim=True)
        sure = len(self._rest[: len(self._rest) - begun(self._rest, "</think>")].rstrip())
        reasoning, self._rest = self._rest[:sure], self._rest[sure:]
        return self._reasoning(reasoning)

    def finish(self) -> list[Part]:
        rest, self._rest = self._rest, ""
        if self._state == "inside":
            return self._reasoning(rest)
        return self._after.feed(rest) + self._after.finish()

    def _reasoning(self, text: str) -> list[Part]:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return [Part("reasoning", text)] if text else []

    def _go_on(self, text: str, trim: bool) -> list[Part]:
        self._state, self._rest, self._begun = "after", "", not trim
        return self._after.feed(self._trim(text))

    def _trim(self, text: str) -> str:
        """Without the empty lines between reasoning and answer."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text


class Harmony:
    """gpt-oss: messages in channels. Calls are those to a recipient, reasoning is the analysis channel."""

    _END = re.compile(r"<\|(?:end|call|return|start)\|>")
    _ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
    _MESSAGE = "<|message|>"

    def __init__(self, decode: Callable[[str, str], Part]) -> None:
        self._decode, self._rest, self._searched = decode, "", 0
        self._header: str | None = None

    def feed(self, text: str) -> list[Part]:
        self._rest += text
        parts: list[Part] = []
        while True:
            if self._header is None:
                header, marker, rest = self._rest.partition(self._MESSAGE)
                if not marker:
                    return parts
                self._header, self._rest = header, rest
            found = self._END.search(self._rest, self._searched)
            if not found:
                return parts + self._sure()
            parts += self._message(self._rest[: found.start()], whole=True)
            self._header, self._rest, self._searched = None, self._rest[found.end() :], 0

    def finish(self) -> list[Part]:
        rest, self._rest = self._rest, ""
        if self._header is not None:
            return self._message(rest, whole=True)
        return _content(rest) if "<|" not in rest and rest.strip() != "assistant" else []

    def _sure(self) -> list[Part]:
        sure = len(self._rest) - max(begun(self._rest, end) for end in self._ENDS)
        parts = self._message(self._rest[:sure], whole=False)
        if parts:
            self._rest = self._rest[sure:]
        self._searched = 0 if parts else sure
        return parts

    def _message(self, text: str, whole: bool) -> list[Part]:
        header = self._header or ""
        if found := re.search(r"to=(?:functions\.)?([\w.-]+)", header):
            return [self._decode(found[1], text)] if whole else []
        kind: Literal["content", "reasoning"] = "reasoning" if "analysis" in header else "content"
        return [Part(kind, text)] if text else []


def begun(text: str, marker: str) -> int:
    """How many last characters of `text` may be the beginning of `marker`."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)


def _content(text: str) -> list[Part]:
    return [Part("content", text)] if text else []
