"""The tokenizer inside the file: the whole `tokenizer.json` back unchanged, and llama.cpp's arrays from it."""

import json

import gguf
import pytest
from tests.formats.helpers import weights, write_folder
from tests.text.helpers import byte_level, metaspace

from hybridlm.config import PRESETS
from hybridlm.errors import FormatError
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import write_config
from hybridlm.formats.vocabulary import tokenizer_entries
from hybridlm.text import Tokenizer

TINY = PRESETS["tiny"].with_(vocab_size=512, hidden_size=32, intermediate_size=32)


def test_everything_about_text_comes_back(tmp_path):
    config = TINY.with_(eos_token_id=(7, 9), bos_token_id=1)
    write_config(config, tmp_path)
    write_folder(tmp_path, weights(config))
    byte_level().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }} naïve")
    summary = convert(tmp_path, tmp_path / "x.gguf", "q8_0")
    assert summary.has_tokenizer and summary.has_chat_template and summary.to_dict()["has_tokenizer"]
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.tokenizer_json == byte_level().to_json() and file.chat_template == "{{ messages }} naïve"
        again = Tokenizer.from_json(file.tokenizer_json)
        assert again.encode("the cat 語") == byte_level().encode("the cat 語")
        meta = file.metadata
        tokens = meta["tokenizer.ggml.tokens"]
        assert len(tokens) == len(meta["tokenizer.ggml.token_type"]) == 512
        for i, token in enumerate(tokens):
            known = again.id_to_token(i)
            assert token == (known if known is not None else f"[PAD{i}]")
            kind = 5 if known is None else 3 if i in again.special_ids else 1
            assert meta["tokenizer.ggml.token_type"][i] == kind
        merges = json.loads(file.tokenizer_json)["model"]["merges"]
        assert [m.split(" ") for m in meta["tokenizer.ggml.merges"]] == [m if isinstance(m, list) else m.split(" ")
                                                                         for m in merges]
        assert (meta["tokenizer.ggml.eos_token_id"], meta["tokenizer.ggml.bos_token_id"]) == (7, 1)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents() == tokens


def test_names_of_pre_tokenizers(tmp_path):
    data = json.loads(byte_level().to_json())
    cl100k = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
    split = {"type": "Split", "pattern": {"Regex": cl100k}, "behavior": "Removed", "invert": True}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    silent = {**plain, "use_regex": False}
    other = {**split, "pattern": {"Regex": "x"}}
    for pre, want in ((plain, "gpt-2"), ({"type": "Sequence", "pretokenizers": [split, silent]}, "dbrx"),
                      ({"type": "Sequence", "pretokenizers": [other, silent]}, "default"), (None, "default")):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "pre_tokenizer": pre}))
        assert tokenizer_entries(tmp_path, TINY)["tokenizer.ggml.pre"].value == want


def test_a_folder_without_tokenizer_and_one_that_is_no_byte_level(tmp_path):
    assert tokenizer_entries(tmp_path, TINY) == {}
    metaspace().save(tmp_path)
    assert tokenizer_entries(tmp_path, TINY)["tokenizer.ggml.pre"].value == "default"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    byte_level().save(tmp_path)
    with pytest.raises(FormatError, match="belongs to another model"):
        tokenizer_entries(tmp_path, TINY.with_(vocab_size=100))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        tokenizer_entries(tmp_path, TINY)
