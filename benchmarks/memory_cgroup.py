"""A command in a memory control group of its own: the kernel kills it if it takes more than it may.

Both versions of the interface; the group is made in the one that this process is in, and removed again.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
ENTER = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); os.execvp(sys.argv[2], sys.argv[2:])"


@dataclass(frozen=True)
class Group:
    folder: Path
    peak_file: str

    def run(self, command: Sequence[str], **options: object) -> "subprocess.CompletedProcess[str]":
        """The command, from its first instruction on in the group; `options` are subprocess.run's."""
        return subprocess.run(self._entering(command), text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]

    def start(self, command: Sequence[str]) -> "subprocess.Popen[str]":
        """The same, to be spoken with; it must have ended before the group can."""
        return subprocess.Popen(
            self._entering(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _entering(self, command: Sequence[str]) -> list[str]:
        return [sys.executable, "-S", "-c", ENTER, str(self.folder / "cgroup.procs"), *command]

    @property
    def peak(self) -> int:
        """Bytes held at most so far, page cache and the kernel's own included."""
        return int((self.folder / self.peak_file).read_text())

    @property
    def kills(self) -> int:
        """Of processes, because there was no memory for them."""
        name = "memory.events" if (self.folder / "memory.events").exists() else "memory.oom_control"
        fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(fields["oom_kill"])


@contextmanager
def memory_group(limit: int) -> Iterator[Group]:
    """A group that may hold `limit` bytes, and no swap. OSError says why none can be made."""
    version_1, parent = _own_group()
    folder = Path(tempfile.mkdtemp(prefix="tenfold-", dir=parent))
    try:
        if version_1:
            (folder / "memory.swappiness").write_text("0")
            (folder / "memory.limit_in_bytes").write_text(str(limit))
            yield Group(folder, "memory.max_usage_in_bytes")
        else:
            if not (folder / "memory.max").exists():
                raise OSError(f"{parent} has no memory controller for groups below it")
            (folder / "memory.max").write_text(str(limit))
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
            yield Group(folder, "memory.peak")
    finally:
        folder.rmdir()


def _own_group() -> tuple[bool, Path]:
    """Whether memory is of version 1 here, and the folder of the group that this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = ROOT / controllers if controllers else ROOT
        if controllers == "memory" or (not controllers and (root / "cgroup.controllers").exists()):
            group = root / path.lstrip("/")
            return bool(controllers), group if group.is_dir() else root
    raise OSError("this system has no memory control groups")


def usable() -> str | None:
    """Why no group can be made here; None where one can."""
    try:
        with memory_group(1 << 30) as group:
            group.run(["true"])
            (group.folder / group.peak_file).stat()
    except OSError as error:
        return str(error)
    return None
