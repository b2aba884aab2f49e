"""GGUF -> GGUF: the same file that conversion would have written, metadata and all, or a clear refusal."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tests.formats.helpers import weights, write_folder
from tests.text.helpers import byte_level

from hybridlm.config import PRESETS
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType
from hybridlm.formats.convert import TYPES, convert
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import write_config
from hybridlm.quantize import quantize

# Widths of 256 and 288, so that K-quants apply to some matrices and fall back in others.
MODEL = PRESETS["tiny"].with_(vocab_size=420, hidden_size=256, intermediate_size=288,
                              layer_types=("linear_attention", "full_attention"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_config(MODEL, path)
    write_folder(path, weights(MODEL))
    byte_level().save(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    convert(path, path / "f32.gguf", "f32")
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_equals_a_direct_conversion(kind, folder, tmp_path):
    want, got = tmp_path / "want.gguf", tmp_path / "got.gguf"
    one, two = convert(folder, want, kind), quantize(folder / "f32.gguf", got, kind)
    assert one.types == two.types and one.fallbacks == two.fallbacks and two.has_tokenizer and two.has_chat_template
    with GGUFFile.open(want) as a, GGUFFile.open(got) as b:
        assert set(a.metadata) == set(b.metadata) and all(a.metadata[k] == b.metadata[k] for k in a.metadata)
        b.check()
        for name in a.tensors:
            np.testing.assert_array_equal(a.data(name), b.data(name))


def test_from_bf16_and_q8_0(folder, tmp_path):
    for source in ("bf16", "q8_0"):
        convert(folder, tmp_path / "s.gguf", source)
        quantize(tmp_path / "s.gguf", tmp_path / "t.gguf", "q4_0")
        with GGUFFile.open(folder / "f32.gguf") as exact, GGUFFile.open(tmp_path / "t.gguf") as coarse:
            a, b = exact.array("blk.0.ffn_up.weight"), coarse.array("blk.0.ffn_up.weight")
            assert 0.01 < np.sqrt(((a - b) ** 2).mean() / (a**2).mean()) < 0.13


def test_tensors_of_the_type_already_are_copied(folder, tmp_path):
    convert(folder, tmp_path / "a.gguf", "q4_0")
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_coarse_sources_are_refused_unless_asked_for(folder, tmp_path):
    convert(folder, tmp_path / "a.gguf", "q4_0")
    with pytest.raises(FormatError, match=r"q4_0 already; quantise from an f16"):
        quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0", allow_requantize=True)
    with GGUFFile.open(tmp_path / "b.gguf") as file:
        assert file.tensors["blk.1.attn_q.weight"].type == GGMLType.Q8_0


def test_source_and_result_must_differ(folder):
    with pytest.raises(FormatError, match="source too"):
        quantize(folder / "f32.gguf", folder / ".." / folder.name / "f32.gguf", "q8_0")
    with pytest.raises(FormatError, match="unknown"):
        quantize(folder / "f32.gguf", folder / "x.gguf", "q9_9")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_leaves_nothing(folder, tmp_path):
    code = ("import sys; from hybridlm.quantize import quantize\n"
            "def hold(done, total):\n  print('on', flush=True); sys.stdin.read()\n"
            "quantize(sys.argv[1], sys.argv[2], 'q8_0', progress=hold)")
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / "f32.gguf"), str(tmp_path / "x.gguf")],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"on\n"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0 and list(tmp_path.iterdir()) == []
