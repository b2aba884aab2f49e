"""A stopped quantisation goes on where it stopped, and nothing stale, damaged or foreign gets into the file."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tests.formats.helpers import weights, write_folder

from hybridlm.config import PRESETS
from hybridlm.errors import FormatError, HybridLMError
from hybridlm.formats import convert as convert_module
from hybridlm.formats.convert import convert
from hybridlm.formats.hf_config import write_config
from hybridlm.formats.resume import resumable_write
from hybridlm.quantize import quantize

MODEL = PRESETS["tiny"].with_(vocab_size=420, hidden_size=64, intermediate_size=96,
                              layer_types=("linear_attention", "full_attention"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_config(MODEL, path)
    write_folder(path, weights(MODEL))
    convert(path, path / "f32.gguf", "f32")
    return path / "f32.gguf"


class Stop(BaseException):
    """Like Ctrl-C."""


def stopped(source, out, after: float, kind="q4_0", **options):
    """Quantise and stop after a share of the bytes."""
    def stop(done, total):
        if done >= after * total:
            raise Stop

    with pytest.raises(Stop):
        quantize(source, out, kind, stop, resume=True, **options)


def encoded(monkeypatch):
    """Counts the tensors' rows that are encoded from now on."""
    count = [0]
    inner = convert_module.encode

    def counting(kind, x, importance=None):
        count[0] += len(x)
        return inner(kind, x, importance)

    monkeypatch.setattr(convert_module, "encode", counting)
    return count


@pytest.mark.parametrize("after", [0.0, 0.5, 0.9])
def test_goes_on(after, source, tmp_path, monkeypatch):
    quantize(source, tmp_path / "want.gguf", "q4_0")
    out = tmp_path / "out.gguf"
    stopped(source, out, after)
    assert not out.exists() and (tmp_path / "out.gguf.partial").exists()
    rows = encoded(monkeypatch)
    seen = []
    quantize(source, out, "q4_0", lambda done, total: seen.append(done), resume=True)
    again, rows[0] = rows[0], 0
    assert out.read_bytes() == (tmp_path / "want.gguf").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"want.gguf", "out.gguf"}
    quantize(source, tmp_path / "all.gguf", "q4_0")
    assert again <= rows[0] and (after == 0 or again < rows[0]) and seen == sorted(seen)


def test_what_differs_starts_again(source, tmp_path, monkeypatch):
    """Another type, another importance: none of what is there may be taken over."""
    out = tmp_path / "out.gguf"
    importance = {"blk.0.ffn_up.weight": np.arange(64, dtype=np.float32)}
    for kind, options in (("q5_0", {}), ("q4_0", {"importance": importance})):
        quantize(source, tmp_path / "want.gguf", kind, **options)
        stopped(source, out, 0.9)
        quantize(source, out, kind, resume=True, **options)
        assert out.read_bytes() == (tmp_path / "want.gguf").read_bytes()


def test_damaged_pieces_are_made_again(source, tmp_path):
    quantize(source, tmp_path / "want.gguf", "q4_0")
    want = (tmp_path / "want.gguf").read_bytes()
    out, partial, log = (tmp_path / f"out.gguf{end}" for end in ("", ".partial", ".partial.journal"))
    rng = np.random.default_rng(0)
    for _ in range(12):
        stopped(source, out, 0.7)
        held, lines = bytearray(partial.read_bytes()), log.read_bytes()
        what = rng.integers(4)
        if what == 0:
            held[rng.integers(len(held))] ^= 1 << int(rng.integers(8))
        elif what == 1:
            del held[rng.integers(len(held)):]
        elif what == 2:
            lines = lines[:rng.integers(len(lines))]
        else:
            lines += b"[99999999, 0]\nnot json\n"
        partial.write_bytes(held)
        log.write_bytes(lines)
        quantize(source, out, "q4_0", resume=True)
        assert out.read_bytes() == want


def test_an_error_leaves_nothing(source, tmp_path):
    def fail(done, total):
        raise FormatError("no")

    with pytest.raises(FormatError):
        quantize(source, tmp_path / "out.gguf", "q4_0", fail, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_two_writers(tmp_path):
    with resumable_write(tmp_path / "x", "key", 10) as pieces:
        pieces.write(b"abc")
        with pytest.raises(HybridLMError, match="another process"), resumable_write(tmp_path / "x", "key", 10):
            pass
        pieces.finish()
    assert (tmp_path / "x").read_bytes() == b"abc"


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed(source, tmp_path):
    """kill -9 in the middle; the journal then names whole tensors only."""
    code = ("import sys; from hybridlm.quantize import quantize\n"
            "def hold(done, total):\n"
            "  if done > total / 2: print('on', flush=True); sys.stdin.read()\n"
            "quantize(sys.argv[1], sys.argv[2], 'q5_0', hold, resume=True)")
    out = tmp_path / "x.gguf"
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(out)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = (tmp_path / "x.gguf.partial.journal").read_text().splitlines()
    assert len(lines) > 5 and json.loads(lines[-1])[0] <= (tmp_path / "x.gguf.partial").stat().st_size
    quantize(source, out, "q5_0", resume=True)
    quantize(source, tmp_path / "want.gguf", "q5_0")
    assert out.read_bytes() == (tmp_path / "want.gguf").read_bytes()
