"""kill -9 at random moments of a conversion: the final name is absent, or what it was before, or a whole file."""

import os
import random
import sys

import pytest
from tests.config.test_atomic import kill_at_random
from tests.formats.helpers import weights, write_folder

from hybridlm.config import PRESETS
from hybridlm.formats.convert import convert
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import write_config

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
MODEL = PRESETS["tiny"].with_(vocab_size=2000)

# Slowed down, so that kills fall into the writing rather than into imports; it says when it starts.
CONVERT = """
import sys, time
from hybridlm.formats import convert
convert.BLOCK_BYTES = 20_000
convert.convert(sys.argv[1], sys.argv[2], "q8_0", progress=lambda done, total: time.sleep(0.002))
"""


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_kill_during_conversion(kills, tmp_path):
    write_config(MODEL, tmp_path / "model")
    write_folder(tmp_path / "model", weights(MODEL))
    out = tmp_path / "out" / "x.gguf"
    out.parent.mkdir()
    convert(tmp_path / "model", tmp_path / "want.gguf", "q8_0")
    want = (tmp_path / "want.gguf").read_bytes()
    rng = random.Random(kills)
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "model"), str(out)]
    killed_while_writing = finished = 0
    for _ in range(kills):
        status = kill_at_random(command, rng.uniform(0.15, 1.6))
        left = [p.name for p in out.parent.iterdir()]
        killed_while_writing += any(name.endswith(".tmp") for name in left)
        finished += status == 0
        assert len(left) <= 2  # the file, and the leftovers of the last writer alone
        if out.exists():
            assert out.read_bytes() == want
        if status == 0 or rng.random() < 0.3:
            out.unlink(missing_ok=True)
    assert kill_at_random(command, 60) == 0
    assert [p.name for p in out.parent.iterdir()] == ["x.gguf"] and out.read_bytes() == want
    with GGUFFile.open(out) as file:
        file.check()
    assert killed_while_writing or kills < 20
