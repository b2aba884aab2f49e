"""The CPU runtime at the 7B's size beside llama.cpp and the machine's limits, interleaved in one run.

    python benchmarks/peer_model.py peer.gguf                      # once: random weights that llama.cpp can run
    python -m benchmarks.cpu --type q4_0 --llama-bench BIN --peer peer.gguf [--rounds 5] [--prompt 512] [--generate 16]

Each round measures, one after the other: the memory read bandwidth and the 8-bit peak, our prefill and decode, and
llama-bench's. Medians over the rounds count; the spread is told, because machines are noisy. llama.cpp runs a model of
another architecture but the same size (see peer_model.py), so compare bytes moved as well as tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from statistics import median

import numpy as np

from hybridlm import HybridConfig, native
from hybridlm.cli.bench import measure
from hybridlm.engine import Engine

GFLOP_A_TOKEN = 13.3  # matrix work of the 7B's prefill, the head on the last token only
PROBE_BYTES = 4 << 30


def peer(binary: str, model: str, prompt: int, generate: int, threads: int) -> dict[str, float]:
    """Tokens a second of one llama-bench run."""
    command = [binary, "-m", model, "-t", str(threads), "-p", str(prompt), "-n", str(generate), "-r", "1", "-o", "json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    speeds = {bool(row["n_prompt"]): row["avg_ts"] for row in rows}
    return {"peer_prefill": speeds[True], "peer_decode": speeds[False]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--type", default="q4_0")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=native.threads())
    parser.add_argument("--llama-bench", help="its binary; left out, only ours is measured")
    parser.add_argument("--peer", help="the file it runs")
    o = parser.parse_args()
    probe = np.ones(PROBE_BYTES, np.uint8)
    engine = Engine.random(HybridConfig.preset(o.preset), o.type, threads=o.threads, kv_type=o.kv_type,
                           context=o.prompt + o.generate + 1, cache_bytes=0)
    rounds = []
    for i in range(o.rounds):
        before = max(native.read_bandwidth(probe) for _ in range(2))
        ours = measure(engine, o.prompt, o.generate, 1)
        row = {"prefill": ours["prefill_tokens_per_s"], "decode": ours["decode_tokens_per_s"],
               "decode_GB_s": ours["decode_bytes_per_s"] / 1e9,
               "read_GB_s": max(before, *(native.read_bandwidth(probe) for _ in range(2))) / 1e9,
               "int8_TOPS": max(native.int8_peak(0.2) for _ in range(3)) / 1e12}
        row["decode_share"] = row["decode_GB_s"] / row["read_GB_s"]
        row["prefill_share"] = row["prefill"] * GFLOP_A_TOKEN / 1e3 / row["int8_TOPS"]
        if tiles := max(native.tile_peak(0.2) for _ in range(3)) / 1e12:
            row["tile_TFLOPS"], row["tile_share"] = tiles, row["prefill"] * GFLOP_A_TOKEN / 1e3 / tiles
            native.set_isa("avx512")  # what a processor without tiles does
            row["prefill_without_tiles"] = measure(engine, o.prompt, 1, 1)["prefill_tokens_per_s"]
            row["share_without_tiles"] = row["prefill_without_tiles"] * GFLOP_A_TOKEN / 1e3 / row["int8_TOPS"]
            native.set_isa("amx")
        if o.llama_bench:
            row |= peer(o.llama_bench, o.peer, o.prompt, o.generate, o.threads)
            row["prefill_ratio"] = row["prefill"] / row["peer_prefill"]
            row["decode_ratio"] = row["decode"] / row["peer_decode"]
        rounds.append(row)
        print(f"round {i + 1}: " + "  ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
    print(f"\n{o.preset} {o.type}, {o.threads} threads, {native.isa()}, {o.prompt} tokens read, {o.generate} written")
    for key in rounds[0]:
        values = [r[key] for r in rounds]
        print(f"{key:15} median {median(values):8.2f}   {min(values):.2f} to {max(values):.2f}")
    best = max(r["read_GB_s"] for r in rounds)
    print(f"decode, median, of the best read of the run ({best:.1f} GB/s): "
          f"{median(r['decode_GB_s'] for r in rounds) / best:.0%}")
    print(json.dumps({"settings": vars(o), "isa": native.isa(), "rounds": rounds,
                      "median": {k: median(r[k] for r in rounds) for k in rounds[0]}}))


if __name__ == "__main__":
    main()
