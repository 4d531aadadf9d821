"""Chat templates: messages to the text that a model was trained to go on from.

A template is Jinja code that somebody else wrote. It runs in Jinja's sandbox, and in a process of its
own (`chat_template_worker.py`) that ends when the template takes too long: nothing inside a Python
process can interrupt one long operation, such as `'a' * 10**10`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError
from tenfold.worker import Worker, WorkerEnded

CPU_SECONDS = 2
MEMORY_MEGABYTES = 512
MEGACHARS = 16  # of rendered text, at most
TEMPLATE_BYTES = 48 << 20
"""Of memory, that the process takes."""

_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of a model by name: "default", and sometimes "tool_use".

    `source` is the file or folder they are from, for messages.
    """

    templates: Mapping[str, str]
    source: str

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, the same that transformers' `apply_chat_template` renders.

        `variables` are what the template may use besides `messages` and `tools`. Raises TenfoldError for
        messages that are none, and for a template that is wrong, that refuses them (`raise_exception`),
        does what the sandbox forbids, or takes too much time or memory.
        """
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise TenfoldError('messages must be a list of at least one {"role": ..., "content": ...}')
        given = {"documents": None, **variables, "messages": [_plain(m) for m in messages], "tools": tools}
        try:
            request = json.dumps({"template": self._choose(tools), "variables": given})
        except (TypeError, ValueError, RecursionError) as error:
            raise TenfoldError(f"what a chat template is given must be plain JSON values: {error}") from None
        answer = _ask(request.encode())
        if "error" in answer:
            raise TenfoldError(f"{self.source}: chat template: {' '.join(answer['error'].split())}")
        return answer["text"]

    def _choose(self, tools: object) -> str:
        wanted = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if wanted not in self.templates:
            known = ", ".join(sorted(self.templates))
            raise TenfoldError(f"{self.source}: no chat template is named default, only {known}")
        return self.templates[wanted]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without fields that are None, and with its reasoning under the names that templates know."""
    plain = {name: value for name, value in message.items() if value is not None}
    for name in _REASONING:
        if name in plain:
            return {"thinking": plain[name], **plain, "reasoning_content": plain[name]}
    return plain


_worker = Worker(
    Path(__file__).with_name("chat_template_worker.py"), CPU_SECONDS, MEMORY_MEGABYTES, MEGACHARS
)


def _ask(request: bytes) -> dict[str, str]:
    try:
        answer: dict[str, str] = json.loads(_worker.ask(request))
    except WorkerEnded as ended:
        return {"error": f"it ran for more than {CPU_SECONDS} seconds" if ended.out_of_time else str(ended)}
    return answer
