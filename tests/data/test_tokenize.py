"""Token shards: exact tokens and bytes, one split decided by content, the same files after any interruption."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tests.data.helpers import text, tokenizer

from hybridlm.data import Source, TokenFolder, tokenize
from hybridlm.data import shards as room
from hybridlm.data.shards import held_out
from hybridlm.errors import DataError


def corpus(folder, count=200, seed=0):
    folder.mkdir(exist_ok=True)
    documents = [text(seed * 1000 + i, 20 + i % 50) for i in range(count)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": d, "domain": f"d{i % 3}"}) + "\n"
                                            for i, d in enumerate(documents)))
    return documents


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_tokens_and_bytes_are_those_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_BATCH_CHARACTERS", 700)
    documents, tok = corpus(tmp_path / "in"), tokenizer()
    folder = tokenize(Source.open(tmp_path / "in"), tok, tmp_path / "out", val_fraction=0.2, shard_tokens=500)
    side = held_out(Source.open(tmp_path / "in"), 0.2)
    for stream, wanted in ((folder.train, [d for d in documents if not side(d)]),
                           (folder.val, [d for d in documents if side(d)])):
        found = list(stream.each())
        assert [tok.decode(ids[1:]) for ids, _, _ in found] == wanted
        assert all(ids[0] == tok.eos for ids, _, _ in found)
        assert [size for _, size, _ in found] == [len(d.encode()) for d in wanted]
        assert [label for _, _, label in found] == [f"d{documents.index(d) % 3}" for d in wanted]
        assert stream.nbytes == sum(len(d.encode()) for d in wanted)
        assert np.array_equal(np.flatnonzero(stream.read(0, len(stream)) == tok.eos), stream.starts)
    assert 0.1 < len(folder.val.documents) / len(documents) < 0.3
    assert len(folder.train.shards) > 3


def test_text_that_spells_a_special_token_stays_text(tmp_path):
    (tmp_path / "a.txt").write_text("before <|endoftext|> after")
    folder = tokenize(Source.open(tmp_path / "a.txt"), tokenizer(), tmp_path / "out")
    tokens = folder.train.read(0, len(folder.train))
    assert (tokens == tokenizer().eos).sum() == 1
    assert tokenizer().decode(tokens[1:]) == "before <|endoftext|> after"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seed", range(6))
def test_interrupted_anywhere_the_files_are_the_same(tmp_path, monkeypatch, seed):
    corpus(tmp_path / "in", seed=seed)
    source, tok, rng = Source.open(tmp_path / "in"), tokenizer(), random.Random(seed)
    monkeypatch.setattr(room, "_BATCH_CHARACTERS", 700)
    options = {"val_fraction": 0.1, "shard_tokens": 300}
    tokenize(source, tok, tmp_path / "whole", **options)
    kills, write = 0, room.write_file

    def fragile(path, data):
        nonlocal kills
        if kills < 8 and rng.random() < 0.2:
            kills += 1
            if rng.random() < 0.5:
                path.with_name(f".{path.name}.01234567.tmp").write_bytes(bytes(data)[:7])
            raise Killed
        write(path, data)

    monkeypatch.setattr(room, "write_file", fragile)
    while True:
        try:
            tokenize(source, tok, tmp_path / "out", **options)
            break
        except Killed:
            pass
    assert kills
    found = {n: b for n, b in files(tmp_path / "out").items() if not n.endswith(".tmp")}
    assert found == files(tmp_path / "whole")


def test_done_once_it_is_not_done_again_and_refuses_other_text(tmp_path, monkeypatch):
    corpus(tmp_path / "in")
    source, tok = Source.open(tmp_path / "in"), tokenizer()
    tokenize(source, tok, tmp_path / "out")
    monkeypatch.setattr(room, "_Writer", None)
    tokenize(source, tok, tmp_path / "out")
    with pytest.raises(DataError, match="val_fraction"):
        tokenize(source, tok, tmp_path / "out", val_fraction=0.1)
    with pytest.raises(DataError, match="tokenizer"):
        tokenize(source, tokenizer(301), tmp_path / "out")


def test_two_documents_give_one_to_each_side_and_copies_stay_together(tmp_path):
    tok = tokenizer()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    folder = tokenize(Source.open(tmp_path / "a.jsonl"), tok, tmp_path / "two", val_fraction=0.001)
    assert (len(folder.train.documents), len(folder.val.documents)) == (1, 1)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n')
    folder = tokenize(Source.open(tmp_path / "b.jsonl"), tok, tmp_path / "copies", val_fraction=0.5)
    assert (len(folder.train.documents), len(folder.val.documents)) == (2, 0)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(tmp_path, harm):
    corpus(tmp_path / "in")
    tokenize(Source.open(tmp_path / "in"), tokenizer(), tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.unlink()
    if harm != "remove":
        shard.write_bytes(raw if harm == "flip" else raw[:-2])
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        TokenFolder.open(tmp_path / "out")


def test_no_text_at_all(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text"):
        tokenize(Source.open(tmp_path / "a.jsonl"), tokenizer(), tmp_path / "out")


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
    from hybridlm.atomic import DiskFullError, write_file

    write_file(tmp_path / "a", b"good")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DiskFullError, match="disk is full"):
        write_file(tmp_path / "a", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"good"
