"""Mixtures hold their weights and nothing but whole documents; packing loses none; repetition is found where it is."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.helpers import text, tokenizer

from hybridlm.data import BatchOrder, Mixture, Source, TokenStream, join, order_of, parse_mixture, tokenize
from hybridlm.data.packing import fit
from hybridlm.data.repetition import repeats
from hybridlm.errors import ConfigError


def stream(sizes, base=0):
    """Documents of the given sizes; a token's value is its place, from `base` on."""
    starts = np.cumsum([0, *sizes[:-1]])
    table = np.stack([starts, np.ones(len(sizes)), np.zeros(len(sizes))], 1).astype(np.int64)
    return TokenStream((np.arange(base, base + sum(sizes), dtype=np.uint32),), (table,))


sizes = st.lists(st.integers(1, 30), min_size=1, max_size=20)
orders = st.sampled_from(["stream", "whole", "mixture"])


def make(kind, one, two, sequence, seed):
    a, b = stream(one), stream(two, 10_000)
    if kind == "mixture":
        return order_of(Mixture((a, b), (0.3, 0.7), seed), "stream", sequence, 4, seed, 4)
    return order_of(a, kind, sequence, 4, seed, 4)


@given(orders, sizes.filter(lambda s: sum(s) > 1), sizes, st.integers(1, 40), st.integers(0, 9), st.data())
@settings(max_examples=80, deadline=None)
def test_the_order_is_the_same_for_any_world_and_any_interruption(kind, one, two, sequence, seed, data):
    """6 steps by one process, beside a run that is broken off anywhere and goes on with other numbers of them."""
    whole = [make(kind, one, two, sequence, seed).at(step) for step in range(6)]
    step = 0
    while step < 6:  # each pass of the loop is a life of the run: fresh objects, its own world, some steps
        world, life = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 6))
        ranks = [make(kind, one, two, sequence, seed) for _ in range(world)]
        for now in range(step, min(6, step + life)):
            parts = [order.at(now, rank, world) for rank, order in enumerate(ranks)]
            for name in ("inputs", "targets", "starts"):
                joined = np.concatenate([getattr(p, name) for p in parts])
                assert np.array_equal(joined, getattr(whole[now], name))
        step += data.draw(st.integers(0, life)) if life > 1 else 1  # the last checkpoint may lie steps back


@given(sizes, sizes, st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_mixture_is_whole_documents_in_its_weights(one, two, weight, seed):
    a, b = stream(one), stream(two, 10_000)
    mixed = Mixture((a, b), (weight / 10, 1 - weight / 10), seed)
    tokens, starts = mixed.read_round(0, len(mixed)), mixed.starts
    documents = [tuple(d) for d in np.split(tokens, starts[1:])]
    known = {tuple(d) for s in (a, b) for d in np.split(s.read(0, len(s)), s.starts[1:])}
    assert set(documents) <= known
    first = (tokens < 10_000).sum()
    largest = max(*one, *two)
    capped = len(mixed) > 7 * (sum(one) + sum(two))
    assert abs(first - weight / 10 * len(mixed)) <= 2 * largest
    if not capped:
        assert set(documents) == known or len(mixed) <= max(sum(one) / (weight / 10), sum(two) / (1 - weight / 10))
    counts = Counter(documents)
    for s in (one, two):
        mine = [counts[tuple(d)] for t in ((a, b)[s is two],) for d in np.split(t.read(0, len(t)), t.starts[1:])]
        assert max(mine) - min(mine) <= 1
    assert np.array_equal(tokens[3:9], mixed.read(3, min(9, len(mixed)))) or len(mixed) < 9


def test_what_data_may_say(tmp_path):
    assert parse_mixture("a:0.7,b:0.3") == [("a", 0.7), ("b", 0.3)]
    assert parse_mixture("a:3, hub:me/b:1") == [("a", 0.75), ("hub:me/b", 0.25)]
    assert parse_mixture("books") == [("books", 1.0)]
    assert parse_mixture("hub:me/b") == [("hub:me/b", 1.0)]
    (tmp_path / "x:1,y:2").mkdir()
    assert parse_mixture(str(tmp_path / "x:1,y:2")) == [(str(tmp_path / "x:1,y:2"), 1.0)]
    for wrong in ("a:0.7,b", "a:0,b:1", "a:1,a:2"):
        with pytest.raises(ConfigError, match=r"^data: "):
            parse_mixture(wrong)


def test_joined_streams_keep_their_names():
    a, b = stream([3, 4]), stream([5], 100)
    joined = join([("one", a), ("two", b)])
    assert [(t.tolist()[0], label) for t, _, label in joined.each()] == [(0, "one"), (3, "one"), (100, "two")]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 90))
@settings(max_examples=60, deadline=None)
def test_best_fit_packs_all_and_tightly(pieces, room):
    rows, count = fit(np.array(pieces), room)
    held = np.bincount(rows, weights=pieces, minlength=count)
    assert held.max() <= room
    assert (held > 0).all()
    if count > 1:  # any two rows together hold more than one could, else the later would not have been opened
        assert np.sort(held)[:2].sum() > room


@given(sizes.filter(lambda s: sum(s) > 1), st.integers(2, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_packed_rows_hold_every_token_once_and_cut_only_what_is_too_long(lengths, sequence, seed):
    order = order_of(stream(lengths), "whole", sequence, 1, seed)
    seen, starts = [], np.cumsum([0, *lengths])
    for step in range(order.windows):
        batch = order.at(step)
        real = batch.targets[0] >= 0
        tokens = batch.inputs[0][real]
        assert np.array_equal(batch.targets[0][real], (tokens + 1) % sum(lengths))
        seen += tokens.tolist()
        begins = tokens[batch.starts[0][real]]
        assert all(b in starts or (b - starts[np.searchsorted(starts, b, "right") - 1]) % sequence == 0 for b in begins)
    assert sorted(seen) == list(range(sum(lengths)))


@given(st.integers(1, 14), st.integers(2, 40), st.integers(0, 60), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_repetition_by_its_definition(period, times, before, seed):
    rng = np.random.default_rng(seed)
    phrase = rng.integers(0, 50, period)
    tokens = np.concatenate([rng.integers(100, 200, before), np.tile(phrase, times), rng.integers(200, 300, 20)])

    def slow(limit):
        return any((tokens[at:at + p * limit].reshape(limit, p) == tokens[at:at + p]).all()
                   for p in range(1, 14) for at in range(len(tokens) - p * limit + 1))

    for limit in (2, 3, 8, 32):
        assert repeats(tokens, limit) == slow(limit)


def test_rows_that_repeat_themselves_are_out_of_the_loss():
    tokens = np.arange(128, dtype=np.uint32)
    tokens[32:64] = 7
    table = np.array([[0, 1, 0]])
    order = BatchOrder(TokenStream((tokens,), (table,)), 32, 4, 0, 16)
    batch = order.at(0)
    bad = np.array([repeats(row, 16) for row in batch.inputs])
    assert bad.any()
    assert not bad.all()
    assert (batch.targets[bad] == -1).all()
    assert (batch.targets[~bad] >= 0).all()
    assert batch.counted == 32 * (~bad).sum()


def test_processes_leave_the_files_that_one_leaves(tmp_path, monkeypatch):
    from hybridlm.data import shards

    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 3000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text(i, 30)}) + "\n" for i in range(120)))
    source = Source.open(tmp_path / "a.jsonl")
    for name, workers in (("one", 1), ("two", 2), ("three", 3)):
        tokenize(source, tokenizer(), tmp_path / name, val_fraction=0.1, shard_tokens=700, workers=workers)
    files = {f.name: f.read_bytes() for f in (tmp_path / "one").iterdir()}
    assert len(files) > 6
    for name in ("two", "three"):
        assert {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} == files


def test_a_hub_data_set_by_its_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents = [text(i, 30) for i in range(30)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    source = Source.open(f"hub:{tmp_path / 'set'}")
    assert [d.text for _, _, d in source.documents()] == documents
    assert [(n, d.text) for _, n, d in source.documents(0, 28)] == [(28, documents[28]), (29, documents[29])]
    assert source.fingerprint == Source.open(f"hub:{tmp_path / 'set'}").fingerprint
    folder = tokenize(source, tokenizer(), tmp_path / "out", val_fraction=0.1)
    assert len(folder.train.documents) + len(folder.val.documents) == 30
