"""The quickstart's corpus, and the whole of it."""

from __future__ import annotations

import json

import pytest

from hybridlm.errors import DataError
from hybridlm.quickstart import corpus, quickstart


def library(folder, count=300):
    for i in range(count):
        file = folder / "lib" / f"package{i % 7}" / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# module {i}\n" + "value = 1\n" * 100)
    return folder / "lib"


def texts(file):
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_the_corpus_is_the_librarys_own_sources_each_on_one_side(tmp_path):
    lib = library(tmp_path)
    for part, name in (("site-packages", "a.py"), ("test", "b.py"), ("package0", "c.txt")):
        (lib / part).mkdir(exist_ok=True)
        (lib / part / name).write_text("# not wanted\n" * 100)
    (lib / "package0" / "copy.py").write_text((lib / "package0" / "module0.py").read_text())
    (lib / "package0" / "latin.py").write_bytes(b"# \xe9\n" * 300)
    (lib / "package0" / "short.py").write_text("x\n")
    corpus(lib, tmp_path / "out" / "train.jsonl", tmp_path / "out" / "held-out.jsonl")
    train, held_out = texts(tmp_path / "out" / "train.jsonl"), texts(tmp_path / "out" / "held-out.jsonl")
    assert len(train) + len(held_out) == len({*train, *held_out}) == 300
    assert 1 <= len(held_out) <= 30
    assert not any("not wanted" in t for t in train + held_out)


def test_a_machine_without_sources_is_told(tmp_path):
    (tmp_path / "lib").mkdir()
    with pytest.raises(DataError, match="no Python sources"):
        corpus(tmp_path / "lib", tmp_path / "train.jsonl", tmp_path / "held-out.jsonl")


@pytest.mark.slow
def test_the_whole_of_it(tmp_path, capfd):
    quickstart(tmp_path / "out", seconds=30)
    found = json.loads((tmp_path / "out" / "bits-per-byte.json").read_text())
    assert found["hf"] < 5
    assert found["q8_0"] == pytest.approx(found["hf"], rel=0.01)
    assert (tmp_path / "out" / "hf" / "config.json").exists()
    assert (tmp_path / "out" / "model-q8_0.gguf").stat().st_size < 3_000_000
    told = capfd.readouterr()
    assert "def read_lines" in told.out
    assert "peak memory" in told.err
