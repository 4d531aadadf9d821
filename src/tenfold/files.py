"""Files that are whole or not there: written under a temporary name, then renamed."""

import errno
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    temporary = _beside(path)
    with writing(path):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse at once what `write_bytes` would refuse after the work whose result is to be written."""
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        temporary = _beside(path)
        temporary.touch()
        temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises TenfoldError naming the file if it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TenfoldError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TenfoldError(f"{path}: not readable as JSON ({error})") from None


def refuse_existing(directory: Path) -> None:
    """A TenfoldError if there is anything at `directory` but an empty folder."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise TenfoldError(f"{directory} is there already and is not an empty directory")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name once the block ends well, else goes away."""
    temporary = _beside(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system refuses (a full disk, a forbidden folder) into a TenfoldError naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TenfoldError(f"{path}: no space left on the disk; nothing was saved there") from None
        raise TenfoldError(f"{path}: cannot be written ({error.strerror or error})") from None


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, so that renaming it to `path` is one step."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
