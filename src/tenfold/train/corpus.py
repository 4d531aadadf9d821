"""Where the text comes from: files, folders, jsonl, parquet, the hub, Python's own source.

Everything streams: one document at a time is in memory, never the corpus.
"""

import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.errors import TenfoldError

STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
FOLDER_SUFFIXES = {".txt", ".md", ".rst", ".py", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class Document:
    """One text and where it was found. The text is never blank and is valid Unicode."""

    name: str
    text: str


def read_documents(sources: Sequence[str]) -> Iterator[Document]:
    """The documents of every source, in order: the same files give the same documents.

    A source is `stdlib`, a folder, a file (.jsonl and .parquet: their field `text`; any other:
    UTF-8 text, one document) or `hf:NAME[:SPLIT]`.
    Raises TenfoldError for a source that is missing, unreadable or without any text.
    """
    if not sources:
        raise TenfoldError("no text to read: give a file, a folder, stdlib or hf:NAME[:SPLIT] as the source")
    for source in sources:
        empty = True
        for document in _read_source(source):
            if document.text and not document.text.isspace():
                empty = False
                yield document
        if empty:
            raise TenfoldError(f"{source}: no documents found, or only empty ones{_accepted(source)}")


def stdlib_files() -> list[Path]:
    """Python's own library in source form, sorted, without its test suites."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if STDLIB_LEFT_OUT.isdisjoint(path.parts)]


def _accepted(source: str) -> str:
    if not Path(source).is_dir():
        return ""
    return f" (in a folder, {' '.join(sorted(FOLDER_SUFFIXES))} files are read)"


def _read_source(source: str) -> Iterator[Document]:
    if source == "stdlib":
        for path in stdlib_files():
            yield from _text_file(path, skip_binary=True)
    elif source.startswith("hf:"):
        yield from _hub(source)
    elif (path := Path(source)).is_dir():
        for member in _folder_files(path):
            yield from _read_file(member, skip_binary=True)
    elif path.is_file():
        yield from _read_file(path, skip_binary=False)
    else:
        raise TenfoldError(
            f"{source}: no such file or folder (a source is a file, a folder, stdlib or hf:NAME[:SPLIT])"
        )


def _folder_files(folder: Path) -> list[Path]:
    """Readable kinds of file below `folder`, sorted; hidden ones (.git, .venv) are left out."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [
        folder / path
        for path in sorted(files)
        if path.suffix.lower() in FOLDER_SUFFIXES and not any(part.startswith(".") for part in path.parts)
    ]


def _read_file(path: Path, skip_binary: bool) -> Iterator[Document]:
    match path.suffix.lower():
        case ".jsonl":
            return _jsonl(path)
        case ".parquet":
            return _parquet(path)
        case _:
            return _text_file(path, skip_binary)


def _text_file(path: Path, skip_binary: bool) -> Iterator[Document]:
    """The whole file as one document, its line endings untouched."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None and "\0" not in text:
        yield Document(str(path), text)
    elif not skip_binary:
        raise TenfoldError(f"{path}: not text (NUL bytes, or not UTF-8); give UTF-8 text")


def _jsonl(path: Path) -> Iterator[Document]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(f"{path}, line {number}", _json_text(line))
    except OSError as error:
        raise _unreadable(path, error) from None


def _json_text(line: bytes) -> Any:
    """The line's field `text`; None, which `_document` refuses, if there is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return record.get("text") if isinstance(record, dict) else None


def _parquet(path: Path) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise TenfoldError(f"{path}: no column text; it has {', '.join(table.schema_arrow.names)}")
            for batch in table.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    row += 1
                    yield _document(f"{path}, row {row}", text)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _hub(source: str) -> Iterator[Document]:
    """A dataset of the Hugging Face hub, from its local cache once it has been downloaded."""
    name, _, split = source.removeprefix("hf:").partition(":")
    split = split or "train"
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # its own, the hub's, the network's and the parsers' kinds
        raise TenfoldError(
            f"{source}: cannot load split {split} of {name} ({_one_line(error)});"
            " download it while online, or give files instead"
        ) from None
    if "text" not in rows.column_names:
        raise TenfoldError(f"{source}: no field text; it has {', '.join(rows.column_names)}")
    for number, row in enumerate(rows, start=1):
        yield _document(f"{source}, row {number}", row["text"])


def _document(name: str, text: Any) -> Document:
    """Raises TenfoldError unless `text` is a string that UTF-8 can hold (JSON can spell others)."""
    try:
        if isinstance(text, str):
            text.encode()
            return Document(name, text)
    except UnicodeEncodeError:
        pass
    raise TenfoldError(f'{name}: expected a record with a string "text" of valid Unicode')


def _unreadable(path: Path, error: Exception) -> TenfoldError:
    return TenfoldError(f"{path}: cannot be read: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """The error's first line, which is where libraries put what went wrong."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
