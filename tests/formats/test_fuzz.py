"""Hostile files: every mutation ends in a `FormatError` or a correct load, within a memory of the file's size.

The fast tier runs a few hundred; `-m slow` more than 20,000.
"""

import random
import struct
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from tests.formats.helpers import weights, write_folder
from tests.formats.mutate import mutate_bytes, mutate_json

from hybridlm.config import PRESETS, HybridConfig
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType, dequantize, nbytes
from hybridlm.formats.checkpoint import Checkpoint
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_header import ValueType
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.gguf_writer import Entry, TensorPlan, i32_list, strings, text, write_gguf
from hybridlm.formats.hf_config import write_config
from hybridlm.formats.safetensors import DTYPES

MODEL = PRESETS["tiny"].with_(vocab_size=40, hidden_size=16, intermediate_size=16, layer_types=(
    "linear_attention", "full_attention"), linear_key_head_dim=4, linear_value_head_dim=8)
COUNTS = [pytest.param(300, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]


def allowed(size: int) -> int:
    """Bytes of memory that opening a file of this size may take: a header's Python objects, and some copies."""
    return 64 * size + (1 << 20)


class Meter:
    """Peak of Python's and numpy's allocations inside the block; it must stay below what the file's size allows."""

    def __init__(self, size: int) -> None:
        self.limit = allowed(size)

    def __enter__(self):
        tracemalloc.reset_peak()
        self.before = tracemalloc.get_traced_memory()[0]

    def __exit__(self, kind, error, trace):
        used = tracemalloc.get_traced_memory()[1] - self.before
        assert used <= self.limit, f"{used} bytes allocated"


@pytest.fixture
def traced():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def inspect_gguf(path) -> bool:
    """Everything a user of the reader can ask; True when it is a whole model."""
    with GGUFFile.open(path) as file:
        for key in file.metadata:
            assert isinstance(file.metadata[key], int | float | str | list)
        spans = []
        for name, t in file.tensors.items():
            data = file.data(name)
            assert data.nbytes == t.nbytes == nbytes(t.type, int(np.prod(t.shape, dtype=object)))
            spans.append((t.offset, t.offset + t.nbytes))
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert not spans or spans[-1][1] <= path.stat().st_size
        assert len(file.fingerprint) == 64
        _ = file.tokenizer_json, file.chat_template
        assert isinstance(file.config, HybridConfig)
        file.check()
        for name, t in file.tensors.items():
            with np.errstate(all="ignore"):
                assert file.array(name).shape == t.shape
    return True


def attempt(check, path, size) -> bool:
    with Meter(size):
        try:
            return check(path)
        except FormatError as error:
            assert 10 < len(str(error)) < 2000
            return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_config(MODEL, path)
    write_folder(path, weights(MODEL))
    return path


@pytest.fixture(scope="module")
def gguf_bytes(folder):
    convert(folder, folder / "whole.gguf", "q8_0")
    return (folder / "whole.gguf").read_bytes()


@pytest.fixture(scope="module")
def odd_gguf_bytes(tmp_path_factory):
    """No model, but every kind of metadata value, so that a small header exercises every branch."""
    path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    numbers = [t for t in ValueType if t not in (ValueType.STRING, ValueType.ARRAY)]
    entries = {f"k.{t.name}": Entry(1, t) for t in numbers} | {f"l.{t.name}": Entry([1, 0], t, True) for t in numbers}
    entries |= {"s": text("text"), "ss": strings(["a", "", "bcd"] * 5), "empty": i32_list([]),
                "general.alignment": Entry(32, ValueType.UINT32)}
    plans = [TensorPlan(f"t{i}", (2, 64), kind, lambda kind=kind: [np.ones(nbytes(kind, 128), np.uint8)])
             for i, kind in enumerate([GGMLType.F32, GGMLType.Q4_0, GGMLType.F16])]
    write_gguf(path, "odd", entries, plans)
    return path.read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_gguf(count, gguf_bytes, odd_gguf_bytes, tmp_path, traced):
    rng = random.Random(count)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes)
    assert attempt(inspect_gguf, path, len(gguf_bytes))
    header = gguf_bytes.index(b"output_norm.weight") + 60
    loads = 0
    for _ in range(count):
        whole = rng.random() < 0.5
        data = mutate_bytes(rng, gguf_bytes, header) if whole else mutate_bytes(rng, odd_gguf_bytes, 1100)
        path.write_bytes(data)
        loads += attempt(inspect_gguf, path, len(data))
    assert loads < count / 2  # most damage is noticed; the rest is in words and weights


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_configuration_in_gguf(count, gguf_bytes, tmp_path, traced):
    count //= 3
    rng = random.Random(count)
    path = tmp_path / "x.gguf"
    key = b"hybridlm.config"
    at = gguf_bytes.index(key) + len(key) + 4
    (size,) = struct.unpack_from("<Q", gguf_bytes, at)
    original = gguf_bytes[at + 8 : at + 8 + size].decode()
    tail = gguf_bytes[at + 8 + size :]
    shift = -len(gguf_bytes) % 32  # the file ends on a boundary; keep the data there
    assert shift == 0
    for _ in range(count):
        changed = mutate_json(rng, original).encode()
        changed += b" " * ((size - len(changed)) % 32)
        path.write_bytes(gguf_bytes[:at] + struct.pack("<Q", len(changed)) + changed + tail)
        attempt(inspect_gguf, path, len(gguf_bytes) + len(changed))


def inspect_folder(path) -> bool:
    checkpoint = Checkpoint.open(path)
    for name, info in checkpoint.tensors.items():
        raw = checkpoint.raw(name)
        assert raw.nbytes == info.nbytes == int(np.prod(info.shape, dtype=object)) * DTYPES[info.dtype]
    checkpoint.check(MODEL)
    for name in checkpoint.tensors:
        with np.errstate(all="ignore"):
            checkpoint.array(name)
    return True


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_safetensors(count, folder, tmp_path, traced):
    rng = random.Random(count)
    whole = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path = tmp_path / "model.safetensors"
    path.write_bytes(whole)
    assert attempt(inspect_folder, tmp_path, len(whole))
    loads = 0
    for _ in range(count):
        if rng.random() < 0.5:
            data = mutate_bytes(rng, whole, 8 + length)
        else:
            text = mutate_json(rng, whole[8 : 8 + length].decode()).encode()
            data = len(text).to_bytes(8, "little") + text + whole[8 + length :]
        path.write_bytes(data)
        loads += attempt(inspect_folder, tmp_path, len(data))
    assert loads < count / 2


@pytest.mark.parametrize("kind", GGMLType, ids=lambda k: k.name)
def test_any_bytes_are_values_of_a_block_type(kind):
    raw = np.frombuffer(random.Random(1).randbytes(nbytes(kind, 512)), np.uint8)
    with np.errstate(all="ignore"):
        assert dequantize(kind, raw, (2, 256)).shape == (2, 256)
