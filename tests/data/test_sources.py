"""Sources: every format gives the same documents, in one order, and what is not text is left out and counted."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tests.data.helpers import text

from hybridlm.data import Source
from hybridlm.errors import DataError

DOCUMENTS = [text(i) for i in range(7)]


def texts(path, **options):
    return [d.text for _, _, d in Source.open(path, **options).documents()]


def rows(documents):
    return "".join(json.dumps({"text": d, "domain": "x" if i % 2 else "y"}) + "\n" for i, d in enumerate(documents))


@pytest.fixture
def each_format(tmp_path):
    raw = rows(DOCUMENTS).encode()
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    table = pa.table({"other": list(range(7)), "text": DOCUMENTS, "domain": ["y", "x", "y", "x", "y", "x", "y"]})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    return tmp_path


def test_every_format_gives_the_same_documents(each_format):
    for file in sorted(each_format.iterdir()):
        found = [d for _, _, d in Source.open(file).documents()]
        assert [d.text for d in found] == DOCUMENTS
        assert [d.label for d in found] == ["y", "x"] * 3 + ["y"]


def test_a_folder_is_its_files_in_order_and_any_place_can_be_resumed(each_format):
    (each_format / "sub").mkdir()
    (each_format / "sub" / "e.txt").write_text("plain\r\ntext", newline="")
    source = Source.open(each_format)
    everything = list(source.documents())
    assert [d.text for _, _, d in everything] == DOCUMENTS * 4 + ["plain\r\ntext"]
    for at, (file, number, _) in enumerate(everything):
        assert list(source.documents(file, number)) == everything[at:]


def test_hidden_and_binary_files_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / ".secret").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b.bin").write_bytes(b"PK\0\1\2")
    (tmp_path / "c.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    source = Source.open(tmp_path)
    assert [d.text for _, _, d in source.documents()] == ["words"]
    assert (source.skipped["hidden"], source.skipped["binary"], source.skipped["empty"]) == (2, 2, 1)


def test_globs_and_files_left_out(each_format):
    assert texts(str(each_format / "*.gz")) == DOCUMENTS
    kept = Source.open(each_format, without=(each_format / "d.parquet", each_format / "a.jsonl"))
    assert [f.name for f in kept.files] == ["b.jsonl.gz", "c.jsonl.zst"]


@pytest.mark.parametrize("size", [100, 5_000, 300_000, 3_000_000])
def test_a_lone_text_file_is_cut_at_paragraphs_and_loses_nothing(tmp_path, size):
    whole = text(1, size // 5)
    (tmp_path / "book.txt").write_text(whole, encoding="utf-8", newline="")
    pieces = texts(tmp_path / "book.txt")
    assert "".join(pieces) == whole
    assert all(p.endswith("\n\n") for p in pieces[:-1])
    assert max(map(len, pieces)) < 2 * 65536 + 100
    assert len(pieces) >= 20 or size < 200_000


def test_bytes_that_are_no_utf8_deep_in_a_file_become_replacement_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 20_000 + b"\xff" + b"b" * 10)
    assert "".join(texts(tmp_path / "a.txt")) == "a" * 20_000 + "\ufffd" + "b" * 10


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": null}\n{"body": ""}\n{"body": "two"}\n')
    assert texts(tmp_path / "a.jsonl", text_field="body") == ["one", "two"]


@pytest.mark.parametrize(("name", "content", "told"), [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
    ("a.jsonl", b'["text"]\n', "no JSON object"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', "no field 'text'; it has body, id"),
    ("a.jsonl", b'{"text": 7}\n', "holds int, not text"),
    ("a.parquet", b"PAR1 and no more", "no Parquet file"),
    ("a.jsonl.gz", gzip.compress(rows(DOCUMENTS).encode())[:-20], "ends early or is damaged"),
    ("a.bin", b"\0\1\2", "not UTF-8 text"),
])
def test_what_cannot_be_read_is_named(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        texts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Source.open(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="no text files"):
        Source.open(tmp_path)
    with pytest.raises(DataError, match="no text files"):
        Source.open(str(tmp_path / "*.txt"))


def test_the_fingerprint_sees_edits(each_format):
    before = Source.open(each_format).fingerprint
    assert Source.open(each_format).fingerprint == before
    with (each_format / "a.jsonl").open("a") as file:
        file.write(rows(["more"]))
    assert Source.open(each_format).fingerprint != before
