"""The tokenizer wrapper: round trips, special tokens, damage; the trained BPE is deterministic."""

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.text.helpers import TEXT, byte_level, metaspace

from hybridlm.errors import ConfigError, DataError, FormatError
from hybridlm.text import SPECIAL_TOKENS, Tokenizer, train_bpe


@given(st.text())
def test_byte_level_round_trip(text):
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text


@given(st.text())
def test_documents_never_make_special_tokens(text):
    tokenizer = byte_level()
    ids = tokenizer.encode_batch([text + "<|endoftext|><|im_start|>" + text])[0]
    assert not tokenizer.special_ids & set(ids)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text + "<|endoftext|><|im_start|>" + text


def test_special_tokens_in_prompts():
    tokenizer = byte_level()
    assert [tokenizer.id_to_token(i) for i in range(4)] == list(SPECIAL_TOKENS)
    assert tokenizer.encode("<|im_start|>") == [2] and tokenizer.eos == 0 and tokenizer.pad == 1
    assert tokenizer.decode([2, *tokenizer.encode("a"), 3], skip_special=True) == "a"


def test_digits_are_grouped_by_three():
    tokenizer = train_bpe(["1234567 " * 50 + "123 4567 999"], 700)
    assert all(len(tokenizer.decode([i]).strip()) <= 3 for i in tokenizer.encode("1234567890123"))


def test_padding_and_unknown_ids_decode_to_nothing():
    tokenizer = byte_level()
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([ids[0], 10**6, *ids[1:]]) == "ab" and tokenizer.token_bytes(10**6) == b""
    assert tokenizer.id_to_token(-1) is None


def test_lone_surrogates_become_replacement_characters():
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_save_open_pickle_fingerprint(tmp_path):
    tokenizer = byte_level()
    tokenizer.save(tmp_path / "t")
    again = Tokenizer.from_file(tmp_path / "t")
    assert (again.eos, again.pad, again.fingerprint) == (tokenizer.eos, tokenizer.pad, tokenizer.fingerprint)
    assert Tokenizer.from_file(tmp_path / "t" / "tokenizer.json").to_json() == tokenizer.to_json()
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the cat") == tokenizer.encode("the cat")
    assert metaspace().fingerprint != tokenizer.fingerprint


def test_config_names_eos(tmp_path):
    byte_level().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.from_file(tmp_path).eos == 3


@given(cut=st.integers(0, 2000), flip=st.integers(0, 255))
def test_damaged_files_are_refused_or_load(cut, flip):
    text = byte_level().to_json()
    damaged = text[:cut] + chr(flip) + text[cut + 1 : -(cut % 7) or None]
    try:
        tokenizer = Tokenizer.from_json(damaged)
    except FormatError as error:
        assert "tokenizer.json" in str(error) and "\n" not in str(error)
    else:
        tokenizer.encode("the cat")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}'])
def test_files_that_are_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "absent")


def test_training_is_deterministic_across_processes():
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from hybridlm.text import train_bpe; from tests.text.helpers import TEXT\n"
        "print(train_bpe(TEXT, 400).fingerprint)"
    )
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
              for _ in range(2)}
    assert prints == {byte_level().fingerprint}


def test_training_from_files_equals_training_from_text(tmp_path):
    files = []
    for i, text in enumerate(TEXT):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(text)
    assert train_bpe(files, 400, tmp_path / "out").fingerprint == byte_level().fingerprint
    assert Tokenizer.from_file(tmp_path / "out").vocab_size <= 400


def test_impossible_training(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size"):
        train_bpe(TEXT, 100)
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 400)
    (tmp_path / "x.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"x\.txt"):
        train_bpe([tmp_path / "x.txt"], 400)
