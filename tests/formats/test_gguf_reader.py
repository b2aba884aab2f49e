"""Our GGUF reader: agrees with gguf-py on good files, refuses each kind of bad header, skips large vocabularies."""

import struct
import sys
from subprocess import run

import gguf
import numpy as np
import pytest

from hybridlm.config import PRESETS
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType
from hybridlm.formats.gguf_header import ValueType
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.gguf_writer import Entry, TensorPlan, strings, text, write_gguf
from hybridlm.formats.metadata import model_entries


def string(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def info(name: str, shape=(4,), kind=0, offset=0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(entries=(), tensors=(), data=b"\0" * 64, *, magic=b"GGUF", version=3, counts=None) -> bytes:
    n = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *n) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


def open_bytes(tmp_path, content: bytes) -> GGUFFile:
    (tmp_path / "x.gguf").write_bytes(content)
    return GGUFFile.open(tmp_path / "x.gguf")


HUGE = 1 << 63
BAD = {
    "empty": b"",
    "short": b"GGUF\3\0\0\0",
    "magic": file(magic=b"GGML"),
    "version 1": file(version=1),
    "version 4": file(version=4),
    "big endian": file(version=0x03000000),
    "tensor count": file(counts=(HUGE, 0)),
    "entry count": file(counts=(0, 2**64 - 1)),
    "entries missing": file(counts=(0, 1), data=b""),
    "empty key": file([entry("", 4, b"\0" * 4)]),
    "key length": file([struct.pack("<Q", HUGE)]),
    "key not UTF-8": file([string(b"\xff\xfe") + struct.pack("<II", 4, 1)]),
    "duplicate key": file([entry("a", 4, b"\0" * 4)] * 2),
    "value type": file([entry("a", 13, b"\0" * 8)]),
    "string length": file([entry("a", 8, struct.pack("<Q", 2**64 - 1))]),
    "array type": file([entry("a", 9, struct.pack("<IQ", 77, 1))]),
    "array length": file([entry("a", 9, struct.pack("<IQ", 4, 2**62))]),
    "array length overflow": file([entry("a", 9, struct.pack("<IQ", 10, 2**61))]),
    "array of arrays": file([entry("a", 9, struct.pack("<IQ", 9, 1) * 500)]),
    "string array length": file([entry("a", 9, struct.pack("<IQ", 8, 2**40))]),
    "string array beyond end": file([entry("a", 9, struct.pack("<IQ", 8, 3) + string("ab") + struct.pack("<Q", 999))]),
    "string array truncated": file([entry("a", 9, struct.pack("<IQ", 8, 2) + string("ab"))], data=b""),
    "alignment 0": file([entry("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 48": file([entry("general.alignment", 4, struct.pack("<I", 48))]),
    "alignment huge": file([entry("general.alignment", 4, struct.pack("<I", 1 << 31))]),
    "alignment text": file([entry("general.alignment", 8, string("32"))]),
    "alignment negative": file([entry("general.alignment", 5, struct.pack("<i", -32))]),
    "tensor name empty": file(tensors=[info("")]),
    "tensor name long": file(tensors=[info("x" * 300)]),
    "no dimensions": file(tensors=[info("a", ())]),
    "five dimensions": file(tensors=[info("a", (1, 1, 1, 1, 4))]),
    "2^32 dimensions": file(tensors=[string("a") + struct.pack("<I", 2**32 - 1)]),
    "zero dimension": file(tensors=[info("a", (4, 0))]),
    "dimension overflow": file(tensors=[info("a", (2**63, 2))]),
    "product overflow": file(tensors=[info("a", (2**32, 2**32))]),
    "type": file(tensors=[info("a", kind=99)]),
    "removed type": file(tensors=[info("a", kind=4)]),
    "part of a block": file(tensors=[info("a", (31, 32), 2)]),
    "beyond the end": file(tensors=[info("a", (17,))]),
    "offset beyond the end": file(tensors=[info("a", offset=64)]),
    "offset overflow": file(tensors=[info("a", offset=2**64 - 32)]),
    "offset unaligned": file(tensors=[info("a", offset=4)]),
    "overlap": file(tensors=[info("a", (16,)), info("b", (8,), offset=32)]),
    "same place": file(tensors=[info("a"), info("b")]),
    "duplicate tensor": file(tensors=[info("a"), info("a", offset=32)]),
    "truncated info": file(tensors=[info("a")[:-3]], data=b""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_refused_in_one_sentence(name, tmp_path):
    with pytest.raises(FormatError, match=r"x\.gguf: ") as caught:
        open_bytes(tmp_path, BAD[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_good_header_beside_the_bad_ones(tmp_path):
    content = file([entry("a", 4, struct.pack("<I", 7)), entry("general.alignment", 4, struct.pack("<I", 32))],
                   [info("a", (4, 2)), info("b", (32,), 8, 32)], struct.pack("<8f", *range(8)) + bytes(34))
    for version in (2, 3):
        with open_bytes(tmp_path, content[:4] + struct.pack("<I", version) + content[8:]) as opened:
            assert dict(opened.metadata) == {"a": 7, "general.alignment": 32}
            assert opened.array("a").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
            assert opened.tensors["b"].type == GGMLType.Q8_0


def test_text_that_is_no_text_is_found_when_read(tmp_path):
    opened = open_bytes(tmp_path, file([entry("a", 8, string(b"\xff")),
                                        entry("b", 9, struct.pack("<IQ", 8, 1) + string(b"\xff")),
                                        entry("hybridlm.config", 4, b"\0" * 4)]))
    for key in "ab":
        with pytest.raises(FormatError, match="UTF-8"):
            opened.metadata[key]
    with pytest.raises(FormatError, match="not text"):
        _ = opened.config


def test_other_models_are_told_apart(tmp_path):
    opened = open_bytes(tmp_path, file([entry("general.architecture", 8, string("llama"))]))
    with pytest.raises(FormatError, match=r"'llama'.*hybridlm convert"):
        _ = opened.config
    for content in ("{", "[]", "{}", '{"layer_types": 3}', '{"layer_types": ["a"]}', "[" * 5000,
                    '{"layer_types": [], "vocab_size": 1e999}'):
        opened = open_bytes(tmp_path, file([entry("hybridlm.config", 8, string(content))], [info("a")]))
        with pytest.raises(FormatError, match="configuration is damaged"):
            _ = opened.config


def test_every_kind_of_metadata_as_gguf_py_writes_and_reads_it(tmp_path):
    values = {ValueType.UINT8: 255, ValueType.INT8: -128, ValueType.UINT16: 65535, ValueType.INT16: -32768,
              ValueType.UINT32: 2**32 - 1, ValueType.INT32: -(2**31), ValueType.FLOAT32: 0.1, ValueType.BOOL: True,
              ValueType.STRING: "naïve 語 \U0001f600", ValueType.UINT64: 2**64 - 1, ValueType.INT64: -(2**63),
              ValueType.FLOAT64: 0.1}
    entries = {f"one.{t.name}": Entry(v, t) for t, v in values.items()}
    entries |= {f"many.{t.name}": Entry([v, v], t, True) for t, v in values.items()}
    path = tmp_path / "x.gguf"
    write_gguf(path, "odd", entries, [])
    theirs = gguf.GGUFReader(path)
    with GGUFFile.open(path) as opened:
        assert set(opened.metadata) == {"general.architecture", *entries}
        for key, e in entries.items():
            got, other = opened.metadata[key], theirs.fields[key].contents()
            assert got == other == (pytest.approx(e.value, rel=1e-6) if "FLOAT32" in key else e.value)
            assert Entry.copy(opened.metadata.raw[key]) == Entry(got, e.type, e.array)


def test_views_outlive_the_file(tmp_path):
    opened = open_bytes(tmp_path, file(tensors=[info("a", (4, 2))], data=struct.pack("<8f", *range(8))))
    view = opened.array("a")
    opened.close()
    assert view.sum() == 28 and not view.flags.writeable
    with pytest.raises(FormatError, match="closed"):
        opened.data("a")


def test_fingerprint_follows_header_and_weights(tmp_path):
    base = file([entry("a", 4, b"\7\0\0\0")], [info("a", (1024,))], bytes(4096))
    prints = {open_bytes(tmp_path, base).fingerprint, open_bytes(tmp_path, base).fingerprint}
    assert len(prints) == 1
    for at in (base.index(b"\7\0\0\0"), len(base) - 1, len(base) - 2048, len(base) - 4096):
        changed = bytearray(base)
        changed[at] ^= 2
        prints.add(open_bytes(tmp_path, bytes(changed)).fingerprint)
    assert len(prints) == 5


def test_a_large_vocabulary_is_skipped_not_decoded(tmp_path):
    """100,000 tokens and merges: opening decodes none of them, and imports neither gguf-py nor torch."""
    path = tmp_path / "x.gguf"
    config = PRESETS["tiny"].with_(layer_types=("full_attention",))
    entries = model_entries(config, "x") | {"tokens": strings([f"token{i}" for i in range(100_000)]),
                                            "merges": strings([f"a b{i}" for i in range(100_000)]),
                                            "tokenizer.huggingface.json": text("{}" * 1_000_000)}
    write_gguf(path, "olmo-hybrid", entries, [TensorPlan("t", (32,), GGMLType.F32, lambda: [np.zeros(128, np.uint8)])])
    code = ("import sys, tracemalloc; from hybridlm.formats.gguf_reader import GGUFFile; tracemalloc.start();"
            f"f = GGUFFile.open({str(path)!r}); assert f.config.vocab_size; peak = tracemalloc.get_traced_memory()[1];"
            "assert peak < 500_000, peak; assert not {'gguf', 'torch'} & set(sys.modules);"
            "assert f.metadata['merges'][99_999] == 'a b99999' and len(f.tokenizer_json) == 2_000_000")
    assert run([sys.executable, "-c", code], check=False).returncode == 0
