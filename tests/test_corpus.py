import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tenfold.errors import TenfoldError
from tenfold.train.corpus import read_documents, stdlib_files


def texts(*sources: Path | str) -> list[str]:
    return [document.text for document in read_documents([str(source) for source in sources])]


def refusal(*sources: Path | str) -> str:
    with pytest.raises(TenfoldError) as caught:
        texts(*sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stdlib_is_sorted_source_without_tests() -> None:
    files = stdlib_files()
    assert {"argparse.py", "ast.py"} <= {path.name for path in files}
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    root = Path(json.__file__).parent.parent
    assert all(left_out.isdisjoint(path.relative_to(root).parts) for path in files)
    assert files == sorted(files)


def test_stdlib_skips_what_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "bad.py").write_text("assert 0\n")
    assert texts("stdlib") == ["x = 1\n"]


def test_folder_is_recursive_sorted_and_known_kinds_only(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.txt", "b/a.PY", "a.md", "c.rst", "picture.png", ".git/hidden.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "empty.txt").touch()
    assert texts(tmp_path) == ["a.md", "b/a.PY", "c.rst", "one", "two", "z.txt"]


def test_a_file_given_by_name_is_text_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "Makefile"
    path.write_bytes("all:\r\n\techo é\n".encode())
    assert texts(path) == ["all:\r\n\techo é\n"]


def test_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path / "b.txt", tmp_path / "a.txt") == ["b", "a"]


def test_parquet_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [f"row {n} é" for n in range(600)]
    pq.write_table(pa.table({"text": rows, "id": range(600)}), path)
    assert texts(path) == rows


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '"a string"',
        '{"content": "x"}',
        '{"text": 3}',
        r'{"text": "\ud800"}',
        "[" * 9999,
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    assert f"{path}, line 3" in refusal(path)


def test_jsonl_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "\xe9"}\n')
    assert f"{path}, line 1" in refusal(path)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 this is no parquet file PAR1")
    assert str(path) in refusal(path)
    pq.write_table(pa.table({"body": ["x"]}), path)
    assert "no column text; it has body" in refusal(path)
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert f"{path}, row 2" in refusal(path)
    pq.write_table(pa.table({"text": pa.array([b"\xff"]).view(pa.string())}), path)
    assert f"{path}: cannot be read" in refusal(path)


def test_missing_empty_and_binary_sources(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "no text to read" in refusal()
    assert "in a folder, " in refusal(tmp_path)
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    assert f"{blank}: no documents" in refusal(blank)
    for content in (b"a\0b", b"\xff\xfe"):
        (tmp_path / "data").write_bytes(content)
        assert f"{tmp_path / 'data'}: not text" in refusal(tmp_path / "data")
    records = tmp_path / "none.jsonl"
    records.write_text('{"text": ""}\n')
    assert f"{records}: no documents" in refusal(records)


@pytest.mark.parametrize("name", ["secret.txt", "secret.jsonl", "secret.parquet"])
def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    path.write_text("x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    assert f"{path}: cannot be read: [Errno 13] Permission denied" in refusal(path)


class Rows(list[dict[str, str]]):
    column_names = ("text",)


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> Rows:
        asked.append((name, split))
        return Rows([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:owner/name") == ["one", "two"]
    assert texts("hf:owner/name:train[:10%]") == ["one", "two"]
    assert asked == [("owner/name", "train"), ("owner/name", "train[:10%]")]
    monkeypatch.setattr(Rows, "column_names", ("body",))
    assert "no field text; it has body" in refusal("hf:owner/name")


def test_hub_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network\nlong story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    message = refusal("hf:owner/name:test")
    assert "split test of owner/name (no network)" in message
    assert "files" in message
