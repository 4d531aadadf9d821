"""Chat templates: messages to the text that a model was trained to go on from.

A template is Jinja code that somebody else wrote. It runs in Jinja's sandbox, and in a process of its
own (`chat_template_worker.py`) that ends when the template takes too long: nothing inside a Python
process can interrupt one long operation, such as `'a' * 10**10`. The first template starts the process,
and it serves all that follow, from any thread.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError

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


_lock = threading.Lock()
_worker: "subprocess.Popen[bytes] | None" = None


def _forget_worker() -> None:
    """In a forked child: two processes must not speak through one pipe."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_forget_worker)


def _ask(request: bytes) -> dict[str, str]:
    global _worker
    with _lock:
        if _worker is None or _worker.poll() is not None:
            _worker = _start()
        try:
            reply = _exchange(_worker, request)
        except BaseException:  # Ctrl-C: its answer would be taken for the next request's
            _worker.kill()
            _worker.wait()
            raise
        if not reply.endswith(b"\n"):
            return {"error": _why_it_ended(_worker.wait())}
    answer: dict[str, str] = json.loads(reply)
    return answer


def _start() -> "subprocess.Popen[bytes]":
    """-P: else the files of this package would hide the standard library's of the same names."""
    file = Path(__file__).with_name("chat_template_worker.py")
    limits = [str(limit) for limit in (CPU_SECONDS, MEMORY_MEGABYTES, MEGACHARS)]
    return subprocess.Popen(
        [sys.executable, "-P", file, *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is not meant for it
    )


def _exchange(worker: "subprocess.Popen[bytes]", request: bytes) -> bytes:
    """The worker's line in answer to a line; not a whole one if it ended."""
    assert worker.stdin and worker.stdout
    try:
        worker.stdin.write(request + b"\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return b""
    return worker.stdout.readline()


def _why_it_ended(returncode: int) -> str:
    if returncode == -signal.SIGPROF:
        return f"it ran for more than {CPU_SECONDS} seconds"
    return f"the process that renders it ended (status {returncode})"
