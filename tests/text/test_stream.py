"""Streaming detokenising equals decoding at once, whatever the ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.text.helpers import byte_level, metaspace

from hybridlm.text import StreamDecoder

EMOJI = st.text(st.sampled_from("👩‍👧🏽é日本0\u200d\ufe0f\ufffda \n\U0010ffff"))


def stream(tokenizer, ids, **options):
    decoder = StreamDecoder(tokenizer, **options)
    pieces = [decoder.push(i) for i in ids]
    return pieces, decoder.finish()


@given(st.lists(st.integers(0, 420)))
def test_byte_level_any_ids(ids):
    """Random ids are random bytes: invalid UTF-8, split characters, special and unknown tokens among them."""
    pieces, rest = stream(byte_level(), ids)
    assert "".join(pieces) + rest == byte_level().decode(ids)


@given(st.lists(st.integers(0, 420)))
def test_metaspace_any_ids(ids):
    """Where the ids spell valid UTF-8 the stream equals the whole; elsewhere it says so and goes on."""
    pieces, rest = stream(metaspace(), ids)
    whole = metaspace().decode(ids)
    assert "\ufffd" in whole or "".join(pieces) + rest == whole


@given(st.lists(st.integers(0, 420)))
def test_special_tokens_skipped(ids):
    pieces, rest = stream(byte_level(), ids, skip_special=True)
    assert "".join(pieces) + rest == byte_level().decode(ids, skip_special=True)


@pytest.mark.parametrize("kind", [byte_level, metaspace])
@given(text=st.one_of(st.text(), EMOJI))
def test_text_round_trip_and_no_half_characters(kind, text):
    tokenizer = kind()
    ids = tokenizer.encode(text, special=False)
    pieces, rest = stream(tokenizer, ids)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + rest == whole
    if "\ufffd" not in whole:
        assert all("\ufffd" not in piece for piece in pieces) and rest == ""


def test_pushing_never_decodes_the_past():
    """Constant work per token: what `push` hands to decode never grows with the text."""
    tokenizer, sizes = metaspace(), []

    class Spy:
        is_byte_level, special_ids = False, frozenset()

        def decode(self, ids, **_):
            sizes.append(len(ids))
            return tokenizer.decode(ids)

        def id_to_token(self, token_id):
            return tokenizer.id_to_token(token_id)

    decoder = StreamDecoder(Spy())
    bad = tokenizer.token_to_id("<0xF0>")
    for i in tokenizer.encode("the cat sat on the mat " * 20) + [bad] * 50:
        decoder.push(i)
    assert max(sizes) <= 8


def test_decoder_is_reusable_after_finish():
    tokenizer = byte_level()
    decoder = StreamDecoder(tokenizer)
    half = tokenizer.encode("日", special=False)[:1]
    decoder.push(half[0])
    decoder.finish()
    assert "".join(decoder.push(i) for i in tokenizer.encode("the")) + decoder.finish() == "the"
