"""The kernels between the projections at the 7B's shapes, against what this machine's memory does in the same run.

Prints a table and one line of JSON. Rounds interleave the kernels with the probes and medians are taken, because a
shared machine's speed drifts by more than the differences that matter.

    python benchmarks/native_mixers.py [--threads 2] [--rounds 9] [--context 8192] [--prompt 512]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hybridlm import native

LAYERS, HEADS, K, V, TAPS = 24, 30, 96, 192, 4
ATTENTION_LAYERS, D = 8, 128
F16, Q8_0 = 1, 8


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class UpdateProbe:
    """Bytes a second read and written by an in-place update of `size` bytes on all threads (numpy, no GIL)."""

    def __init__(self, size: int, threads: int) -> None:
        self.parts = np.array_split(np.ones(size // 4, np.float32), threads)
        self.pool = ThreadPoolExecutor(threads)
        self.bytes = 2 * size

    def __call__(self) -> float:
        return self.bytes / seconds(lambda: list(self.pool.map(lambda x: np.negative(x, out=x), self.parts)))


class DeltaNet:
    """Inputs and the states of all layers; `run(layer, ...)` is one call of the mixer."""

    def __init__(self, tokens: int, rng: np.random.Generator) -> None:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        keys, values = HEADS * K, HEADS * V
        self.tokens = tokens
        self.rows = (normal(tokens, keys), normal(tokens, keys), normal(tokens, values), normal(tokens, HEADS),
                     normal(tokens, HEADS), normal(tokens, values))
        # One allocation for all states, as an engine has it: large enough for the system's large pages.
        self.states = np.full((LAYERS, HEADS, K, V), 0, np.float32)
        self.layers = [(normal(keys, TAPS), normal(keys, TAPS), normal(values, TAPS), -np.exp(normal(HEADS)),
                        normal(HEADS), normal(V), np.zeros((2 * keys + values, TAPS - 1), np.float32),
                        state) for state in self.states]
        self.out = np.empty((tokens, values), np.float32)

    def run(self, chunked: bool = True) -> None:
        for layer in self.layers:
            native.gdn(*self.rows, *layer, 1e-5, True, self.out, chunked=chunked)

    @property
    def state_bytes(self) -> int:
        return self.states.nbytes


class Attention:
    """One layer's cache of `context` tokens, and queries for the last `tokens` of them."""

    def __init__(self, tokens: int, context: int, kv_type: int, rng: np.random.Generator, layers: int) -> None:
        block, row = 256, {F16: 2 * D, Q8_0: D // 32 * 34}[kv_type]
        count = -(-context // block)
        self.kv_type, self.block, self.start = kv_type, block, context - tokens
        size = HEADS * block * row
        self.memory = np.full(2 * count * layers * size, 0, np.uint8)
        addresses = self.memory.ctypes.data + size * np.arange(2 * count * layers, dtype=np.uint64)
        self.tables = addresses.reshape(layers, count, 2)
        x = rng.standard_normal((context, HEADS * D), np.float32)
        for table in self.tables:
            for which in (0, 1):
                native.store_kv(x, table, which, block, kv_type, 0, HEADS, D)
        self.q = rng.standard_normal((tokens, HEADS * D), np.float32)
        self.out = np.empty_like(self.q)
        self.read_bytes = 2 * HEADS * context * row * layers

    def run(self) -> None:
        for table in self.tables:
            native.attention(self.q, table, self.block, self.kv_type, self.start, HEADS, D, 0, self.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=native.threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=512)
    args = parser.parse_args()
    native.set_threads(args.threads)
    rng = np.random.default_rng(0)

    step, verify, prompt = DeltaNet(1, rng), DeltaNet(4, rng), DeltaNet(args.prompt, rng)
    decode = {name: Attention(1, args.context, kind, rng, 2) for name, kind in (("f16", F16), ("q8_0", Q8_0))}
    prefill = Attention(args.prompt, args.context // 2, F16, rng, 1)
    same = UpdateProbe(step.state_bytes, args.threads)
    large = UpdateProbe(1 << 29, args.threads)
    reading = np.ones(1 << 30, np.uint8)
    norm_x, norm_w = np.ones((1, 384), np.float32), np.ones(384, np.float32)
    norm_out = np.empty_like(norm_x)

    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    for round_ in range(args.rounds):
        note("update GB/s, state-sized", same() / 1e9)
        for _ in range(3):
            note("state kernel GB/s", 2 * step.state_bytes / seconds(step.run) / 1e9)
        note("update GB/s, 512 MiB", large() / 1e9)
        note("4 tokens ms, 24 layers", 1e3 * seconds(verify.run))
        note("read GB/s", native.read_bandwidth(reading) / 1e9)
        for name, cache in decode.items():
            for _ in range(3):
                note(f"attention {name} GB/s", cache.read_bytes / seconds(cache.run) / 1e9)
        note("attention prefill ms/token, 8 layers", 8e3 * seconds(prefill.run) / args.prompt)
        if round_ % 2 == 0:
            note("chunked ms/token, 24 layers", 1e3 * seconds(prompt.run) / args.prompt)
            note("token by token ms/token", 1e3 * seconds(lambda: prompt.run(chunked=False)) / args.prompt)
        note("rms_norm 1 x 384 us", 1e3 * seconds(lambda: [native.rms_norm(norm_x, norm_w, 1e-6, norm_out)
                                                            for _ in range(1000)]))

    result = {name: statistics.median(values) for name, values in samples.items()}
    best_update = max(result["update GB/s, state-sized"], result["update GB/s, 512 MiB"])
    result["state kernel share of update"] = result["state kernel GB/s"] / best_update
    for name in decode:
        result[f"attention {name} share of read"] = result[f"attention {name} GB/s"] / result["read GB/s"]
    for name, value in result.items():
        print(f"{name:40s} {value:9.3f}")
    print(json.dumps({"isa": native.isa(), "threads": args.threads, "context": args.context, "prompt": args.prompt,
                      **{name: round(value, 4) for name, value in result.items()}}))


if __name__ == "__main__":
    main()
