"""Replicas: any flipped bit changes the sums, and the odd rank of three or more is named."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.train.checksum import Replicas, bit_sums, odd_ones

DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64, torch.int64: torch.int64}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(DTYPES)), st.integers(1, 300), st.data())
def test_every_single_flipped_bit_changes_the_sum(dtype, size, data):
    tensor = torch.randn(size).to(dtype)
    before = bit_sums({"a": tensor}).item()
    whole = DTYPES[dtype]
    bits = 8 * tensor.element_size()
    bit = data.draw(st.integers(0, bits - 1))
    mask = 1 << bit if bit < bits - 1 else -(1 << bit)
    tensor.view(whole)[data.draw(st.integers(0, size - 1))] ^= mask
    assert bit_sums({"a": tensor}).item() != before


def test_not_a_number_and_scalars_have_sums_too():
    assert bit_sums({"a": torch.tensor(float("nan")), "b": torch.tensor(3.0), "c": torch.empty(0)}).shape == (3,)


def test_the_odd_one_of_three_is_named():
    whole = [("", "")] * 3
    assert odd_ones([[1, 5], [1, 5], [1, 5]], whole, ["a", "b"]) == ([], [])
    assert odd_ones([[1, 5], [1, 9], [1, 5]], whole, ["a", "b"]) == ([1], ["b"])
    assert odd_ones([[1, 5], [2, 9], [1, 5]], whole, ["a", "b"]) == ([1], ["a", "b"])


def test_of_two_none_is_named():
    assert odd_ones([[1], [2]], [("",)] * 2, ["a"]) == ([], ["a"])
    assert odd_ones([[1], [1], [2], [2]], [("",)] * 4, ["a"]) == ([], ["a"])


def test_only_holders_of_the_same_piece_are_compared():
    pieces = [("0",), ("1",), ("0",), ("1",), ("0",), ("1",)]
    assert odd_ones([[1], [2], [1], [2], [1], [2]], pieces, ["a"]) == ([], [])
    assert odd_ones([[1], [2], [1], [3], [1], [2]], pieces, ["a"]) == ([3], ["a"])


def test_one_process_has_nothing_to_compare():
    Replicas(None).check({"a": torch.ones(2)}, "checkpoint of step 1")
