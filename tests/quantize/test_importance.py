"""Importance matrices: the sums are those of the activations, files are whole and checked, collections go on."""

import contextlib

import gguf
import numpy as np
import pytest
from tests.formats.helpers import weights, write_folder
from tests.text.helpers import byte_level

from hybridlm.config import PRESETS
from hybridlm.engine import Engine
from hybridlm.errors import DataError, FormatError
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import write_config
from hybridlm.formats.names import specs
from hybridlm.quantize import Importance, collect, quantize
from hybridlm.quantize import importance as importance_module

MODEL = PRESETS["tiny"].with_(vocab_size=420, hidden_size=64, intermediate_size=96, eos_token_id=0,
                              layer_types=("linear_attention", "full_attention"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_config(MODEL, path)
    write_folder(path, weights(MODEL))
    byte_level().save(path)
    convert(path, path / "f32.gguf", "f32")
    return path / "f32.gguf"


@pytest.fixture
def text(tmp_path):
    """A little over 3,000 bytes, hence tokens at most."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + int(i)) for i in np.random.default_rng(0).integers(0, 26, 3000)))
    return path


def test_sums_are_those_of_the_activations(model, text):
    """The embedding's rows, through the first norm, are what the first layer's projections see."""
    found = collect(model, [text], tokens=500, window=100)
    with GGUFFile.open(model) as file:
        found.check(file.config, "x")
        assert set(found.sums) == {s.gguf for s in specs(file.config) if s.matrix}
        table, norm = (file.array(n).astype(np.float64) for n in ("token_embd.weight", "blk.0.attn_norm.weight"))
    engine = Engine.open(model)
    ids = [0, *engine.tokenizer.encode(text.read_text(), special=False)][:500]
    x = table[ids]
    u = norm * x / np.sqrt((x**2).mean(-1, keepdims=True) + MODEL.rms_norm_eps)
    for role in ("attn_q", "attn_k", "attn_v", "attn_gate", "ssm_alpha", "ssm_beta"):
        np.testing.assert_allclose(found.sums[f"blk.0.{role}.weight"], (u**2).sum(0), rtol=1e-4)
        assert found.counts[f"blk.0.{role}.weight"] == 500
    np.testing.assert_allclose(found.weights()["blk.0.attn_q.weight"], (u**2).mean(0), rtol=1e-4)
    widths = {"ssm_out": 2, "ffn_down": 3}  # others see the model's width
    for name, sums in found.sums.items():
        assert (sums > 0).any() and (name.split(".")[-2] in widths or len(sums) == 64)


def test_files_are_whole_checked_and_read_by_others(model, text, tmp_path):
    path = tmp_path / "i.gguf"
    found = collect(model, [text], path, tokens=300, window=128)
    again = Importance.load(path)
    assert again.digest == found.digest and again.counts == found.counts and again.source == ("text.txt",)
    theirs = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    np.testing.assert_array_equal(theirs["blk.1.ffn_up.weight.in_sum2"].reshape(-1),
                                  found.sums["blk.1.ffn_up.weight"].astype(np.float32))
    assert float(theirs["blk.1.ffn_up.weight.counts"].reshape(-1)[0]) == 384
    held = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(30):  # a flipped bit in the figures never passes
        bad = bytearray(held)
        bad[len(held) - 1 - int(rng.integers(2000))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with contextlib.suppress(FormatError):
            assert Importance.load(path).digest == found.digest  # padding
    path.write_bytes(held[:-100])
    with pytest.raises(FormatError):
        Importance.load(path)
    with pytest.raises(FormatError, match="no importance matrix"):
        Importance.load(model)


def test_goes_on_where_it_stopped(model, text, tmp_path, monkeypatch):
    want = collect(model, [text], tokens=1000, window=100)
    path = tmp_path / "i.gguf"
    monkeypatch.setattr(importance_module, "SAVE_EVERY", 0.0)

    def stop(done, total):
        if done >= 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, [text], path, tokens=1000, window=100, progress=stop)
    assert Importance.load(path).windows == 4
    seen = []
    got = collect(model, [text], path, tokens=1000, window=100, progress=lambda done, total: seen.append(done))
    assert seen == list(range(500, 1001, 100))
    for name, sums in want.sums.items():
        np.testing.assert_allclose(got.sums[name], sums, rtol=1e-6)
    assert got.counts == want.counts
    seen.clear()  # finished: nothing is read again; more is
    collect(model, [text], path, tokens=1000, window=100, progress=lambda done, total: seen.append(done))
    assert not seen
    collect(model, [text], path, tokens=1200, window=100, progress=lambda done, total: seen.append(done))
    assert seen == [1100, 1200]
    (other := tmp_path / "other.txt").write_text("something else " * 200)
    with pytest.raises(FormatError, match="another text"):
        collect(model, [other], path, tokens=1000, window=100)
    with pytest.raises(FormatError, match="other settings"):
        collect(model, [text], path, tokens=1000, window=128)


def test_what_cannot_be(model, text, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        collect(model, [tmp_path / "empty.txt"])
    found = collect(model, [text], tokens=100, window=100)
    with pytest.raises(FormatError, match="another model"):
        found.check(MODEL.with_(intermediate_size=128), "i.gguf")
    with pytest.raises(FormatError, match="another model"):
        found.check(MODEL.with_(layer_types=("linear_attention",) * 3), "i.gguf")


def test_helps(model, text, tmp_path):
    """The error that calibration text would see falls, for the matrix's own output."""
    found = collect(model, [text], tokens=1000, window=500).weights()
    for kind in ("q4_0", "q5_0", "iq4_nl"):
        for name, importance in (("plain", None), ("weighed", found)):
            quantize(model, tmp_path / f"{name}.gguf", kind, importance=importance)
        name = "blk.1.ffn_down.weight"
        with GGUFFile.open(model) as a, GGUFFile.open(tmp_path / "plain.gguf") as b, \
                GGUFFile.open(tmp_path / "weighed.gguf") as c:
            plain, weighed = (((file.array(name) - a.array(name)) ** 2 * found[name]).sum() for file in (b, c))
        assert weighed < plain
