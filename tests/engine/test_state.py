"""States: pages, sharing, bytes, hostile bytes."""

import hashlib
import io
import json

import numpy as np
import pytest
from tests.engine.helpers import small_config

from hybridlm.config import FULL, LINEAR, SLIDING
from hybridlm.engine.layout import PAGE, Layout
from hybridlm.engine.state import _PREFIX, State
from hybridlm.errors import FormatError, HybridLMError

CONFIG = small_config(layer_types=(LINEAR, SLIDING, FULL, LINEAR, SLIDING), sliding_window=100)
LAYOUT = Layout.of(CONFIG, "a model", "f16")


def filled(count: int, layout: Layout = LAYOUT, seed: int = 0, step: int = 37) -> State:
    """A state that has read `count` tokens, with random content where a pass would have written."""
    rng, state = np.random.default_rng(seed), State(layout)
    while state.position < count:
        n = min(step, count - state.position)
        state.reserve(n)
        for group in state.groups:
            for i in range(state.position // PAGE, -(-(state.position + n) // PAGE)):
                a, b = max(0, state.position - i * PAGE), min(PAGE, state.position + n - i * PAGE)
                part = group.last(i)[..., a:b, :]
                part[...] = rng.integers(0, 256, part.shape)
        state.tokens += rng.integers(0, CONFIG.vocab_size, n).tolist()
        for array in (state.conv, state.recurrent, state.hidden):
            array[...] = rng.standard_normal(array.shape)
    return state


def test_layout_groups_layers_by_window():
    assert LAYOUT.layers == (-1, 0, 1, -1, 0) and LAYOUT.windows == (100, 0) and LAYOUT.slots == (0, 0, 0, 1, 1)
    assert LAYOUT.page_shape(0) == (2, 2, CONFIG.kv_heads, PAGE, 2 * CONFIG.head_dim)
    with pytest.raises(HybridLMError, match="kv_type"):
        Layout.of(CONFIG, "", "int4")
    with pytest.raises(HybridLMError, match="head width 16"):
        Layout.of(CONFIG, "", "q8_0")
    wide = Layout.of(CONFIG.with_(hidden_size=64), "", "q8_0")
    assert wide.row_bytes == 34


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 250, 300])
def test_a_clone_is_equal_shares_full_pages_and_copies_the_rest(count):
    state = filled(count)
    before = state.to_bytes()
    clone = state.clone()
    assert clone.to_bytes() == before and clone.tokens == state.tokens
    assert [id(b) for b in clone.blocks()] == [id(b) for b in state.blocks()]
    assert len(state.blocks()) == count // PAGE + (count // PAGE - max(0, count - 99) // PAGE)
    for array in (clone.conv, clone.recurrent, clone.hidden):
        array[...] = 7
    if count % PAGE:
        for group in clone.groups:
            group.last()[...] = 7
    clone.reserve(200)
    clone.tokens += [0] * 200
    assert state.to_bytes() == before


def test_growing_moves_no_page_and_frees_what_no_window_sees():
    state = filled(64)
    first = [id(p) for p in state.groups[1].pages]
    for _ in range(40):
        state.reserve(50)
        state.tokens += [1] * 50
    assert [id(p) for p in state.groups[1].pages[:1]] == first
    sliding, full = state.groups
    assert sum(p is not None for p in full.pages) == -(-2064 // PAGE)
    assert sum(p is not None for p in sliding.pages) <= 100 // PAGE + 3
    # Every address that a kernel may look at leads into a page that is alive.
    for group in state.groups:
        alive = [(p.ctypes.data, p.ctypes.data + p.nbytes) for p in group.pages if p is not None]
        for slot in range(len(group.addresses)):
            for address in group.table(slot)[:len(group.pages)].flat:
                assert any(a <= int(address) < b for a, b in alive)


def test_addresses_point_to_keys_and_values_of_their_layer():
    import ctypes

    state = filled(130)
    for group in state.groups:
        heads, row = LAYOUT.kv[0], LAYOUT.row_bytes
        for slot in range(len(group.addresses)):
            for i in range(len(group.pages)):
                for which in range(2):
                    got = (ctypes.c_uint8 * (heads * PAGE * row)).from_address(int(group.table(slot)[i, which]))
                    np.testing.assert_array_equal(np.array(got), group.last(i)[slot, which].ravel())


def test_bytes_are_counted_as_held():
    state = filled(200)
    fixed = state.conv.nbytes + state.recurrent.nbytes + state.hidden.nbytes
    assert state.own_nbytes == fixed + LAYOUT.page_bytes(0) + LAYOUT.page_bytes(1)
    assert state.nbytes == state.own_nbytes + sum(b.nbytes for b in state.blocks())
    state.reset()
    assert state.position == 0 and state.to_bytes() == State(LAYOUT).to_bytes()


@pytest.mark.parametrize("count", [0, 1, 64, 100, 300])
@pytest.mark.parametrize("types", [(LINEAR, FULL), (LINEAR,), (FULL,), (SLIDING, LINEAR, FULL)])
def test_bytes_round_trip(count, types):
    layout = Layout.of(small_config(layer_types=types, sliding_window=70), "x", "f32")
    state = filled(count, layout, seed=count)
    data = state.to_bytes()
    arrays = layout.own_bytes(count) + sum(map(layout.page_bytes, layout.full_pages(count)))
    assert arrays < len(data) < arrays + 6 * count + 1000
    again = State.from_bytes(data)
    assert again.to_bytes() == data and again.tokens == state.tokens and again.layout == layout
    parts = b"".join(bytes(p) for p in state.own_parts())
    blocks = [State.block(bytes(b)) for b in state.blocks()]
    assert State.rebuild(layout, state.tokens, parts, blocks).to_bytes() == data
    with pytest.raises(ValueError):
        State.rebuild(layout, state.tokens, parts + b"0", blocks)
    if blocks:
        with pytest.raises(ValueError):
            State.rebuild(layout, state.tokens, parts, blocks[1:])


def test_damaged_bytes_are_refused():
    data = filled(100).to_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(data)
        if rng.integers(3) == 0:
            del bad[int(rng.integers(len(bad))):]
        else:
            at = int(rng.integers(200 if rng.integers(2) else len(bad)))
            bad[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(FormatError):
            State.from_bytes(bytes(bad))
    with pytest.raises(FormatError):
        State.from_bytes(data + b"x")
    with pytest.raises(FormatError, match="another model"):
        State.from_bytes(data, Layout.of(CONFIG, "b model", "f16"))


def test_a_header_that_claims_too_much_allocates_nothing():
    """Consistent checksums, hostile numbers."""
    good = filled(100).to_bytes()
    size = _PREFIX.unpack(good[:_PREFIX.size])[2]
    header = json.loads(good[_PREFIX.size:_PREFIX.size + size])
    payload = good[_PREFIX.size + size:-32]
    hostile = [("recurrent", [1 << 23, 1 << 23, 1 << 23]), ("recurrent", [-1, 12, 24]), ("recurrent", [2, 12]),
               ("recurrent", [2.0, 12, 24]), ("conv", "ab"), ("layers", [0] * 5), ("layers", [-1] * 100_000),
               ("kv_type", "f64"), ("kv_type", ["f16"]), ("windows", [0]), ("windows", [-1, 0]), ("hidden", 1 << 23),
               ("kv", [1 << 23, 1 << 23]), ("fingerprint", 3), ("kv", None), ("new", 1)]
    for key, value in hostile:
        bad = json.loads(json.dumps(header))
        bad["layout"][key] = value
        check(bad, payload)
    for tokens in ([-1], ["a"], None, 5, [0] * 101, [1 << 40], [True] * 100):
        check({**header, "tokens": tokens}, payload)
    for whole in ([], {}, None, {"layout": 3, "tokens": []}):
        check(whole, payload)
    with pytest.raises(FormatError):
        State.read(io.BytesIO(_PREFIX.pack(b"hlmstate", 1, (1 << 32) - 1) + b"{}"), 30, "x")
    with pytest.raises(FormatError, match="version 9"):
        State.from_bytes(_PREFIX.pack(b"hlmstate", 9, 2) + b"{}" + bytes(32))


def check(header: object, payload: bytes) -> None:
    text = json.dumps(header).encode()
    data = _PREFIX.pack(b"hlmstate", 1, len(text)) + text + payload
    with pytest.raises(FormatError):
        State.from_bytes(data + hashlib.sha256(data).digest())
