"""The folder in which a packed model grows: hidden beside its place, resumable, renamed once whole."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError
from tenfold.files import read_json, refuse_existing, write_json, writing

STATE = "packing.json"


@contextmanager
def growing_folder(out: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder to fill, which is renamed to `out` when the block ends well.

    It stays where the block fails after a whole file, for the same `identity` to go on with, and the
    error then says so. Raises TenfoldError if `out` is there, if another process is filling the folder, or
    if it has another identity, naming the first field that differs.
    """
    refuse_existing(out)
    out = out.absolute()
    folder = out.with_name(f".{out.name}.packing")
    with writing(out):
        folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        with writing(out):
            _begin(folder, identity)
        try:
            yield folder
            folder.rename(out)
        except (Exception, KeyboardInterrupt) as error:
            _explain(error, out, folder)
    (out / STATE).unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two that wrote to the same files would damage them unseen."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise TenfoldError(f"{folder} is being filled by another `tenfold pack`: wait for it") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def _begin(folder: Path, identity: dict[str, Any]) -> None:
    state = folder / STATE
    if not state.is_file() or not whole_files(folder):
        for stray in folder.glob("model-*"):
            stray.unlink()
        write_json(state, identity)
        return
    old = read_json(state)
    for name, value in identity.items():
        given = old.get(name) if isinstance(old, dict) else None
        if given != value:
            what = f"with {name} {given}, not {value}"
            raise TenfoldError(
                f"{folder} holds an unfinished pack {what}: finish it with the same settings, or delete it"
            )


def whole_files(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def _explain(error: BaseException, out: Path, folder: Path) -> None:
    """Raise `error` in words, with the way to go on if there is something to go on with."""
    hint = ""
    if whole_files(folder):
        hint = f"; what is done is kept in {folder}, and the same command goes on from there"
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if isinstance(error, KeyboardInterrupt):
        raise KeyboardInterrupt(f"interrupted{hint}") from None
    if isinstance(error, TenfoldError):
        raise TenfoldError(f"{error}{hint}") from None
    if isinstance(error, OSError):
        raise TenfoldError(f"{out}: cannot be written ({error.strerror or error}){hint}") from None
    raise error
