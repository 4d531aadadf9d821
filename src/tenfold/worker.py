"""Processes for what is hostile or may crash: a line in, a line out, within limits of time and memory."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


class WorkerEnded(Exception):
    """Instead of an answer."""

    def __init__(self, returncode: int) -> None:
        super().__init__(f"the process ended (status {returncode})")
        self.out_of_time = returncode == -signal.SIGPROF


class Worker:
    """A script that answers each line of its input with a line; it sees to its limits itself.

    The first question starts it, and it serves all that follow, from any thread; where it has ended, the
    next question starts it again.
    """

    def __init__(self, script: Path, *limits: int) -> None:
        """`limits` are its arguments."""
        self.command = [str(script), *map(str, limits)]
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked child: two processes must not speak through one pipe."""
        self._lock, self.process = threading.Lock(), None

    def ask(self, request: bytes) -> bytes:
        """Its answer to a line. Raises WorkerEnded."""
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self._start()
            try:
                reply = self.exchange(self.process, request)
            except BaseException:  # Ctrl-C: its answer would be taken for the next request's
                self.process.kill()
                self.process.wait()
                raise
            if not reply.endswith(b"\n"):
                raise WorkerEnded(self.process.wait())
            return reply

    def _start(self) -> "subprocess.Popen[bytes]":
        """-P: else the files of this package would hide the standard library's of the same names."""
        return subprocess.Popen(
            [sys.executable, "-P", *self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not meant for it
        )

    def exchange(self, process: "subprocess.Popen[bytes]", request: bytes) -> bytes:
        """The line in answer to a line; not a whole one if it ended."""
        assert process.stdin and process.stdout
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()
