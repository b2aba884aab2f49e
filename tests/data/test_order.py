"""The order of batches: each epoch visits each window once, at any world size, from any step."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.data import BatchOrder, TokenStream
from hybridlm.data.order import permute
from hybridlm.errors import ConfigError


def stream(sizes, shards=1):
    """Documents of the given sizes; a token's value is its place in the stream."""
    total = sum(sizes)
    starts = np.cumsum([0, *sizes[:-1]])
    bounds = np.linspace(0, len(sizes), shards + 1).astype(int)
    arrays, tables = [], []
    for a, b in pairwise(bounds):
        if a == b:
            continue
        first, end = starts[a], starts[b] if b < len(sizes) else total
        arrays.append(np.arange(first, end, dtype=np.uint32))
        tables.append(np.stack([starts[a:b] - first, np.ones(b - a), np.zeros(b - a)], 1).astype(np.int64))
    return TokenStream(tuple(arrays), tuple(tables))


streams = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 4)).filter(
    lambda x: sum(x[0]) > 1)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permute_mixes_and_depends_on_the_key():
    one, two = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (one == two).mean() < 0.02
    assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.15
    assert (np.abs(np.diff(one)) == 1).mean() < 0.02


def test_permute_takes_numbers_beyond_32_bits():
    size = 5_000_000_000_000
    sent = permute(np.arange(size - 1000, size), size, 7)
    assert len(set(sent.tolist())) == 1000
    assert sent.min() >= 0
    assert sent.max() < size


@given(streams, st.integers(1, 50), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_covers_the_stream_once(which, sequence, seed, epoch):
    tokens = stream(*which)
    order = BatchOrder(tokens, sequence, 1, seed)
    first = order.window(np.arange(order.windows) + epoch * order.windows)
    seen = np.concatenate([tokens.read_round(int(f), sequence) for f in first])
    if sequence <= len(tokens):
        assert len(set(seen.tolist())) == len(seen)
        assert len(seen) > len(tokens) - sequence


@given(streams, st.integers(1, 50), st.integers(0, 9), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_any_world_size_and_any_step_give_the_same_rows(which, sequence, seed, step):
    order = BatchOrder(stream(*which), sequence, 12, seed)
    whole = order.at(step)
    for world in (2, 3, 4):
        parts = [BatchOrder(stream(*which), sequence, 12, seed).at(step, r, world) for r in range(world)]
        for name in ("inputs", "targets", "starts"):
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


@given(streams, st.integers(1, 50), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_targets_are_one_on_and_documents_are_marked(which, sequence, step):
    tokens = stream(*which)
    batch = BatchOrder(tokens, sequence, 3, 0).at(step)
    assert batch.inputs.shape == batch.targets.shape == batch.starts.shape == (3, sequence)
    assert np.array_equal(batch.targets, (batch.inputs + 1) % len(tokens))
    assert np.array_equal(batch.starts, np.isin(batch.inputs, tokens.starts))
    cuts = batch.cu_seqlens
    assert cuts[0] == 0
    assert cuts[-1] == 3 * sequence
    assert np.array_equal(cuts[:-1] % sequence == 0, np.isin(cuts[:-1], [0, sequence, 2 * sequence]))
    assert set(np.flatnonzero(batch.starts.ravel())) <= set(cuts.tolist())


def test_epochs_differ_in_cut_and_order():
    order = BatchOrder(stream([1000]), 10, 1, 0)
    one, two = (order.window(np.arange(100) + e * 100) for e in (0, 1))
    assert set(one % 10) != set(two % 10) or not np.array_equal(one, two)
    assert (one == two).mean() < 0.1


def test_the_order_is_pinned():
    """These numbers must never change: a checkpoint's place in the data depends on them."""
    order = BatchOrder(stream([1000]), 10, 4, 1)
    assert order.rows(0).tolist() == PINNED[0]
    assert order.rows(40).tolist() == PINNED[1]


PINNED = [[505, 485, 55, 335], [947, 327, 377, 747]]


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match="batch"):
        BatchOrder(stream([100]), 10, 4, 0).at(0, 0, 3)
    with pytest.raises(ConfigError, match="data"):
        BatchOrder(stream([1]), 10, 4, 0)
