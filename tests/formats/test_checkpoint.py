"""Safetensors folders: the safetensors package and transformers check what we write, and write what we read."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from tests.formats.helpers import configs, encode, generations, weights, write_folder

from hybridlm.config import PRESETS
from hybridlm.errors import FormatError
from hybridlm.formats import checkpoint as checkpoint_module
from hybridlm.formats.checkpoint import Checkpoint, save_checkpoint
from hybridlm.formats.hf_config import write_config

TINY = PRESETS["tiny"].with_(vocab_size=64, hidden_size=32, intermediate_size=48)


@settings(max_examples=15, deadline=None)
@given(config=configs())
def test_every_generation_reads_as_canonical(config, tmp_path_factory):
    tensors = weights(config)
    for generation in generations(tensors).values():
        folder = tmp_path_factory.mktemp("model")
        write_folder(folder, generation, max_shard_bytes=9000)
        checkpoint = Checkpoint.open(folder)
        checkpoint.check(config)
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, want in tensors.items():
            assert checkpoint.tensors[name].shape == want.shape
            np.testing.assert_array_equal(checkpoint.array(name), want)
            np.testing.assert_array_equal(checkpoint.raw(name), np.frombuffer(want.tobytes(), np.uint8))
            half = len(want) // 2
            np.testing.assert_array_equal(checkpoint.rows(name, half, len(want)), want[half:])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_the_safetensors_package_reads_what_we_write(dtype, tmp_path):
    from safetensors import safe_open

    tensors = weights(TINY)
    write_folder(tmp_path, tensors, dtype, metadata={"made": "here"})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == tensors.keys() and file.metadata() == {"format": "pt", "made": "here"}
        checkpoint = Checkpoint.open(tmp_path)
        for name in tensors:
            theirs = file.get_tensor(name)
            np.testing.assert_array_equal(theirs.float().numpy(), checkpoint.array(name))
            assert theirs.shape == checkpoint.tensors[name].shape
            assert checkpoint.tensors[name].dtype == dtype


@pytest.mark.parametrize("original_names", [True, False])
@settings(max_examples=4, deadline=None)
@given(config=configs())
def test_transformers_loads_ours_and_we_load_theirs(original_names, config, tmp_path_factory):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    tensors = weights(config)
    if config.tie_word_embeddings:
        assert "lm_head.weight" not in tensors
    write_config(config, ours)
    write_folder(ours, tensors, max_shard_bytes=20_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # Twice: as a file of another generation, and back through this package.
    model.save_pretrained(theirs, save_original_format=original_names)
    checkpoint = Checkpoint.open(theirs)
    checkpoint.check(config)
    for name, want in tensors.items():
        np.testing.assert_array_equal(checkpoint.array(name), want, err_msg=name)


def test_olmo3_both_ways(tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = TINY.twin()
    write_config(config, tmp_path)
    tensors = weights(config)
    write_folder(tmp_path, tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(model).__name__ == "Olmo3ForCausalLM"
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), tensors.get(name, tensors["model.embed_tokens.weight"]))
    model.save_pretrained(tmp_path / "again")
    Checkpoint.open(tmp_path / "again").check(config)


def test_data_may_come_late_and_in_pieces(tmp_path):
    order = []

    def produce():
        order.append("called")
        yield np.arange(4, dtype="<f4")
        yield b"\0" * 16

    listed = [("a", "F32", (8,), produce), ("b", "U8", (0,), b""), ("c", "F32", (), np.array(1.5, "<f4"))]
    assert not order
    save_checkpoint(tmp_path, listed)
    opened = Checkpoint.open(tmp_path)
    assert opened.array("a").tolist() == [0, 1, 2, 3, 0, 0, 0, 0] and opened.array("c") == 1.5
    with pytest.raises(ValueError, match="b: data does not have"):
        save_checkpoint(tmp_path, [("b", "F32", (3,), b"1234")])
    assert opened.array("a").sum() == 6  # the file that was there is untouched
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]


def test_saving_over_a_checkpoint_of_another_number_of_shards(tmp_path):
    tensors = weights(TINY)
    for size in (1 << 30, 30_000, 60_000, 1 << 30):
        write_folder(tmp_path, tensors, max_shard_bytes=size)
        held = {p.name for p in tmp_path.iterdir()}
        index = tmp_path / "model.safetensors.index.json"
        named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        assert held == named | ({index.name} if index.exists() else set())
        Checkpoint.open(tmp_path).check(TINY)


def test_a_save_that_fails_keeps_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    tensors = weights(TINY)
    write_folder(tmp_path, tensors, max_shard_bytes=30_000)

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, [("a", "U8", (1,), b"1"), ("b", "U8", (1,), broken)], max_shard_bytes=1)
    Checkpoint.open(tmp_path).check(TINY)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


def test_what_is_missing_or_odd_is_named(tmp_path):
    tensors = weights(TINY)

    def refused(changed, match, config=TINY):
        write_folder(tmp_path, changed)
        with pytest.raises(FormatError, match=match):
            Checkpoint.open(tmp_path).check(config)

    refused({n: t for n, t in tensors.items() if n != "model.norm.weight"}, r"model\.norm\.weight is missing")
    refused({**tensors, "model.surprise": np.ones(3, np.float32)}, r"model\.surprise is no part")
    refused({**tensors, "model.norm.weight": np.ones(3, np.float32)}, r"model\.norm\.weight is \[3\]")
    refused(tensors, "lm_head", TINY.with_(tie_word_embeddings=False))
    write_folder(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"],
                            "model.layers.3.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    Checkpoint.open(tmp_path).check(TINY)  # harmless company of a tied model
    with pytest.raises(FormatError, match="neither"):
        Checkpoint.open(tmp_path / "nowhere")


def test_integers_are_no_weights(tmp_path):
    save_checkpoint(tmp_path, [("a", "I32", (2,), np.arange(2, dtype="<i4"))])
    with pytest.raises(FormatError, match="a: I32 values"):
        Checkpoint.open(tmp_path).array("a")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../secret"}}',
                                     '{"weight_map": {"a": 7}}', '{"weight_map": {"a": "gone.safetensors"}}',
                                     '{"weight_map": {"absent": "one.safetensors"}}',
                                     '{"weight_map": {"a": ["x"]}}', "[" * 50_000])
def test_hostile_index(content, tmp_path):
    save_checkpoint(tmp_path, [("a", "U8", (1,), b"x")])
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    (tmp_path.parent / "secret").write_bytes(b"")
    (tmp_path / checkpoint_module.INDEX).write_text(content)
    with pytest.raises(FormatError):
        Checkpoint.open(tmp_path)


def header_file(path: Path, header, data=b"\0" * 8) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("header", [
    b"", b"nul", b"[]", b"{" * 10_000, b"\xff", b'{"a":1}', b'{"a":{}}', b'{"a":{"dtype":"F32","shape":[2]}}',
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
    {"a": {"dtype": "F32", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [1 << 64], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
    {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},  # a tail that is nobody's
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a gap
    {x: {"dtype": "U8", "shape": [5], "data_offsets": [3 * i, 3 * i + 5]} for i, x in enumerate("ab")},  # an overlap
    {"a": {"dtype": "F32", "shape": [1] * 9 + [2], "data_offsets": [0, 8]}},
    b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
])
def test_hostile_header(header, tmp_path):
    header_file(tmp_path / "model.safetensors", header)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567", (1 << 63).to_bytes(8, "little") + b"{}",
                                     (40 << 20).to_bytes(8, "little") + bytes(41 << 20)])
def test_hostile_length(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


def test_bfloat16_is_exact(tmp_path):
    values = np.array([1.0, -2.5, 3.0e38, 1e-40, 0.0], dtype=np.float32)
    save_checkpoint(tmp_path, [("a", "BF16", values.shape, encode(values, "BF16"))])
    want = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(Checkpoint.open(tmp_path).array("a"), want)
