"""A synthetic checkpoint of the 7B's 523 tensors, in the released naming and in shards, through a small memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hybridlm.config import PRESETS
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import write_config
from hybridlm.formats.names import specs
from hybridlm.formats.safetensors import DTYPES, TensorInfo, header

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
LIMIT = 2 << 30


def sparse_checkpoint(folder: Path, config, shard_bytes: int) -> int:
    """bf16 zeros that take no disk, with a few values at the start of each shard. Returns the number of shards."""
    write_config(config, folder)
    shards: list[list[TensorInfo]] = [[]]
    for spec in specs(config):
        size = int(np.prod(spec.hf_shape)) * DTYPES["BF16"]
        if sum(t.nbytes for t in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(TensorInfo(spec.name, "BF16", spec.hf_shape, size))
    places = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        places |= {t.name: name for t in shard}
        with (folder / name).open("wb") as file:
            head = header(shard, {})
            file.write(head + b"\x80\x3f" * 1000)  # ones
            file.truncate(len(head) + sum(t.nbytes for t in shard))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return len(shards)


def anonymous_peak(command: list[str]) -> int:
    """Run a command; the largest RssAnon seen, in bytes."""
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.01)
    assert process.wait() == 0
    return peak


CODE = "import sys; from hybridlm.formats.convert import convert; convert(sys.argv[1], sys.argv[2], sys.argv[3])"


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Tensors of 400 MB in float32 pass through; the peak stays far below one of them."""
    config = PRESETS["tiny"].with_(vocab_size=100_000, hidden_size=1024, intermediate_size=1024,
                                   layer_types=("full_attention",), tie_word_embeddings=False)
    sparse_checkpoint(tmp_path, config, 1 << 40)
    peak = anonymous_peak([sys.executable, "-c", CODE, str(tmp_path), str(tmp_path / "x.gguf"), "bf16"])
    assert 0 < peak < 300 << 20, peak


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_7b(tmp_path):
    config = PRESETS["7b"]
    assert sparse_checkpoint(tmp_path, config, 5 << 30) == 3
    out = tmp_path / "7b.gguf"
    started = time.monotonic()
    peak = anonymous_peak([sys.executable, "-c", CODE, str(tmp_path), str(out), os.environ.get("TYPE", "q4_0")])
    print(f"7B: {out.stat().st_size / 1e9:.2f} GB in {time.monotonic() - started:.0f} s, RssAnon {peak / 1e6:.0f} MB")
    assert peak < LIMIT, peak
    with GGUFFile.open(out) as file:
        file.check()
        assert len(file.tensors) == 523 and file.config == config
        assert file.array("token_embd.weight")[0, :1000] == pytest.approx(np.ones(1000), rel=0.1)
    out.unlink()
