"""How near the matrix kernels come to what the machine can do, at the shapes of the 7B model.

Decode (one to eight rows of x) is a question of memory: gigabytes of weights a second, beside what a loop that only
reads gets from the same memory at the same moment. Prefill is a question of arithmetic: operations a second, beside
what a loop of 8-bit dot products in registers gets. Probe and kernel take turns in each round and medians are compared,
so that a busy machine slows both.

    python benchmarks/native_linear.py --types q4_0 q4_k q6_k --json result.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from hybridlm import native

# ggml number, weights and bytes of a block, where its float16 scales lie.
TYPES = {
    "f32": (0, 1, 4, ()), "f16": (1, 1, 2, ()), "bf16": (30, 1, 2, ()), "q8_0": (8, 32, 34, (0,)),
    "q4_0": (2, 32, 18, (0,)), "q5_0": (6, 32, 22, (0,)), "iq4_nl": (20, 32, 18, (0,)),
    "q4_k": (12, 256, 144, (0, 2)), "q5_k": (13, 256, 176, (0, 2)), "q6_k": (14, 256, 210, (208,)),
}
# Rows and columns of the projections of a Gated DeltaNet block and its MLP; those in one list share their input.
LAYER = [[(2880, 3840), (2880, 3840), (5760, 3840), (5760, 3840)], [(11008, 3840), (11008, 3840)], [(3840, 11008)]]


def blocks(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks of a type, at most `size` bytes."""
    _, _weights, width, scales = TYPES[name]
    if not scales:
        values = rng.standard_normal(size // 4, np.float32)
        if name == "f32":
            return values.view(np.uint8)
        values = values[: size // 4]
        half = values.astype(np.float16).view(np.uint16) if name == "f16" else (values.view(np.uint32) >> 16)
        return np.tile(half.astype(np.uint16), 2).view(np.uint8)
    raw = rng.integers(0, 256, (size // width, width), dtype=np.uint8)
    for place in scales:
        raw[:, place : place + 2] = np.full(1, 0.01, np.float16).view(np.uint8)
    return raw.reshape(-1)


class Layers:
    """As many layers as fit into a buffer of blocks."""

    def __init__(self, name: str, data: np.ndarray) -> None:
        kind, weights, width, _ = TYPES[name]
        self.groups: list[list[native.Matrix]] = []
        at = 0
        while True:
            for group in LAYER:
                made = []
                for rows, cols in group:
                    size = rows * cols // weights * width
                    if at + size > len(data):
                        return
                    made.append(native.Matrix(data[at : at + size], kind, rows, cols))
                    at += size
                self.groups.append(made)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for group in self.groups for matrix in group)

    def run(self, t: int, rng: np.random.Generator) -> float:
        """Seconds of one pass with t rows of x."""
        xs = {cols: rng.standard_normal((t, cols), np.float32) for cols in {m.cols for g in self.groups for m in g}}
        outs = [[np.zeros((t, m.rows), np.float32) for m in group] for group in self.groups]
        start = time.perf_counter()
        for group, to in zip(self.groups, outs, strict=True):
            native.linear(xs[group[0].cols], group, to)
        return time.perf_counter() - start


def decode(name: str, data: np.ndarray, probe: np.ndarray, t: int, rounds: int, rng: np.random.Generator) -> dict:
    layers = Layers(name, data)
    layers.run(t, rng)
    got, could = [], []
    for _ in range(rounds):
        could.append(native.read_bandwidth(probe, 2))
        got.append(layers.nbytes / layers.run(t, rng))
    speed, limit = statistics.median(got), statistics.median(could)
    return {"type": name, "rows_of_x": t, "bytes_per_s": speed, "read_bytes_per_s": limit, "share": speed / limit,
            "best_bytes_per_s": max(got), "best_read_bytes_per_s": max(could)}


def prefill(name: str, data: np.ndarray, t: int, rounds: int, rng: np.random.Generator) -> dict:
    layers = Layers(name, data)
    layers.groups = layers.groups[1:3]
    work = 2 * t * sum(matrix.rows * matrix.cols for group in layers.groups for matrix in group)
    layers.run(t, rng)
    got, could = [], []
    for _ in range(rounds):
        could.append(native.int8_peak(0.1))
        got.append(work / layers.run(t, rng))
    speed, limit = statistics.median(got), statistics.median(could)
    return {"type": name, "rows_of_x": t, "ops_per_s": speed, "int8_ops_per_s": limit, "share": speed / limit,
            "best_ops_per_s": max(got), "best_int8_ops_per_s": max(could)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=list(TYPES), metavar="TYPE")
    parser.add_argument("--decode", nargs="*", type=int, default=[1, 4, 8], metavar="ROWS")
    parser.add_argument("--prefill", nargs="*", type=int, default=[512], metavar="ROWS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=768, help="weights of a type, several times the last cache")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", choices=native.available())
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    if options.threads:
        native.set_threads(options.threads)
    if options.isa:
        native.set_isa(options.isa)

    rng = np.random.default_rng(0)
    probe = np.ones(1 << 30, np.uint8)
    result: dict = {"isa": native.isa(), "threads": native.threads(), "decode": [], "prefill": []}
    print(f"{native.isa()}, {native.threads()} threads; medians of {options.rounds} rounds, best in brackets")
    print(f"{'':8}{'rows':>5}  {'kernel':>16}  {'machine':>16}  share")
    for name in options.types:
        data = blocks(name, options.megabytes << 20, rng)
        for t in options.decode:
            row = decode(name, data, probe, t, options.rounds, rng)
            result["decode"].append(row)
            print(f"{name:8}{t:5}  {row['bytes_per_s'] / 1e9:5.1f} ({row['best_bytes_per_s'] / 1e9:4.1f}) GB/s  "
                  f"{row['read_bytes_per_s'] / 1e9:5.1f} ({row['best_read_bytes_per_s'] / 1e9:4.1f}) GB/s  "
                  f"{row['share']:.0%}", flush=True)
        for t in options.prefill:
            row = prefill(name, data, t, max(3, options.rounds // 2), rng)
            result["prefill"].append(row)
            print(f"{name:8}{t:5}  {row['ops_per_s'] / 1e12:5.2f} ({row['best_ops_per_s'] / 1e12:4.2f}) TOPS  "
                  f"{row['int8_ops_per_s'] / 1e12:5.2f} ({row['best_int8_ops_per_s'] / 1e12:4.2f}) TOPS  "
                  f"{row['share']:.0%}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
