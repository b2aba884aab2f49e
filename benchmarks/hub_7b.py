"""A model of the 7B's shape by its name, from a hub on this machine: what a first and a second use cost.

    python -m benchmarks.hub_7b --work /somewhere/with/35GB [--preset 7b] [--type q4_0] [--kill 2] [--free]

Random weights in the released naming and shards are served by the stand-in hub of the tests; `hybridlm generate` opens
them by name, is killed as often as asked for during the download, and run again until it writes text. Told: peak disk
of the cache, peak memory with and without file-backed pages, seconds until the first token, of the first use and of the
next. What it makes (twice the checkpoint's size and the file) lies in the work folder, and goes at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tests.store.hub_server import HubServer

from hybridlm.config import HybridConfig
from hybridlm.formats.checkpoint import save_checkpoint
from hybridlm.formats.names import specs
from hybridlm.text import Tokenizer, train_bpe

NAME = "someone/random-7b"
PROMPT = "The history of the steam engine begins"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; one is trained when left out")
    parser.add_argument("--kill", type=int, default=1, help="times to kill -9 the first use while it downloads")
    parser.add_argument("--free", action="store_true", help="with HYBRIDLM_FREE_DOWNLOADS=1")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    served, home = options.work / "served", options.work / "home"
    try:
        folder = served / NAME
        size = write_model(folder, HybridConfig.preset(options.preset), options.tokenizer)
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards", flush=True)
        with HubServer(served) as hub:
            environment = {**os.environ, "HF_ENDPOINT": hub.url, "HYBRIDLM_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                           "HF_HOME": str(options.work / "hf"), "HYBRIDLM_FREE_DOWNLOADS": "1" if options.free else ""}
            command = [sys.executable, "-m", "hybridlm.cli", "generate", f"{NAME}:{options.type}", PROMPT, "-n", "8",
                       "--temperature", "0", "--stats"]
            for kill in range(options.kill):
                share = (kill + 1) / (options.kill + 1)
                run(command, environment, home, until=lambda share=share: used(home / "hub") > share * size)
                print(f"killed with {used(home) / 1e9:.2f} GB in the cache", flush=True)
            report = {"preset": options.preset, "type": options.type, "checkpoint_bytes": size,
                      "first": run(command, environment, home), "bytes_sent": hub.sent,
                      "second": run(command, environment, home), "cache_bytes_after": used(home)}
        print(json.dumps(report, indent=1))
    finally:
        if not options.keep:
            for path in (served, home, options.work / "hf"):
                shutil.rmtree(path, ignore_errors=True)


def write_model(folder: Path, config: HybridConfig, tokenizer: Path | None) -> int:
    """Random bfloat16 weights of plausible sizes, as the released files hold them; returns their bytes."""
    tile = np.random.default_rng(0).standard_normal(1 << 22).astype(np.float32)

    def data(shape: tuple[int, ...], norm: bool) -> Callable[[], Iterator[bytes]]:
        def produce() -> Iterator[bytes]:
            values = np.ones_like(tile) if norm else tile * shape[-1] ** -0.5
            block = (values.view(np.uint32) >> 16).astype("<u2")
            left = int(np.prod(shape))
            while left:
                yield block[:left].tobytes()
                left -= min(left, len(block))

        return produce

    tensors = [(s.name, "BF16", s.hf_shape, data(s.hf_shape, s.name.endswith("norm.weight"))) for s in specs(config)]
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, tensors)
        (Tokenizer.from_file(tokenizer) if tokenizer else train_bpe([__doc__ * 50], 600)).save(folder)
        config.save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def used(folder: Path) -> int:
    """Bytes that files take on the disk."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512  # noqa: PTH118
            except FileNotFoundError:
                continue
    return total


def run(command: list[str], environment: dict[str, str], home: Path, until: Callable[[], bool] | None = None) -> dict:
    """Run to the end, or kill -9 when `until` holds; watched twice a second."""
    began = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    os.set_blocking(process.stdout.fileno(), False)
    figures = {"peak_disk_bytes": 0, "peak_rss_bytes": 0, "peak_anonymous_bytes": 0}
    first, text = None, b""
    while process.poll() is None:
        resident, file_backed = memory(process.pid)
        figures["peak_disk_bytes"] = max(figures["peak_disk_bytes"], used(home))
        figures["peak_rss_bytes"] = max(figures["peak_rss_bytes"], resident)
        figures["peak_anonymous_bytes"] = max(figures["peak_anonymous_bytes"], resident - file_backed)
        if until is not None and until():
            process.kill()
            process.wait()
            return figures
        for _ in range(10):
            if part := process.stdout.read():
                text += part
                first = first or time.monotonic() - began
            time.sleep(0.05)
    text += process.stdout.read() or b""
    errors = process.stderr.read().decode()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors}")
    return {**figures, "seconds_to_first_text": first or time.monotonic() - began,
            "seconds": time.monotonic() - began, "stats": errors.strip().splitlines()[-1]}


def memory(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and how many of them are pages of files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssFile"))}
    return kb.get("VmRSS", 0) * 1024, kb.get("RssFile", 0) * 1024


if __name__ == "__main__":
    main()
