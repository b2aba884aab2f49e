"""The kernels between the projections at the 7B's shapes, against what this machine's memory does in the same run.

Prints a table and one line of JSON. Rounds interleave the kernels with the probes, each call (a layer) is timed by
itself, and the table shows medians and best tenths: a shared machine's speed drifts by more than the differences that
matter, and on a busy one the best tenth is closer to what the kernel does.

    python benchmarks/native_mixers.py [--threads 2] [--rounds 9] [--context 8192] [--prompt 512]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from hybridlm import native
from hybridlm.native import _native

LAYERS, HEADS, K, V, TAPS = 24, 30, 96, 192, 4
ATTENTION_LAYERS, D = 8, 128
F16, Q8_0 = 1, 8


def buffer(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros as an engine should allocate what is streamed: at once, for the system's large pages, and on a cache line
    (numpy's own large arrays begin 16 bytes after one, and every vector then straddles two)."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(size + 64, 0, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first:first + size].view(dtype).reshape(shape)


class DeltaNet:
    """Inputs and the states of all layers; `run(layer, ...)` is one call of the mixer."""

    def __init__(self, tokens: int, rng: np.random.Generator) -> None:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        keys, values = HEADS * K, HEADS * V
        self.tokens = tokens
        self.rows = (normal(tokens, keys), normal(tokens, keys), normal(tokens, values), normal(tokens, HEADS),
                     normal(tokens, HEADS), normal(tokens, values))
        self.states = buffer((LAYERS, HEADS, K, V), np.float32)
        self.layers = [(normal(keys, TAPS), normal(keys, TAPS), normal(values, TAPS), -np.exp(normal(HEADS)),
                        normal(HEADS), normal(V), np.zeros((2 * keys + values, TAPS - 1), np.float32),
                        state) for state in self.states]
        self.out = np.empty((tokens, values), np.float32)

    def run(self, layer: int, chunked: bool = True) -> None:
        native.gdn(*self.rows, *self.layers[layer], 1e-5, True, self.out, chunked=chunked)


class Attention:
    """One layer's cache of `context` tokens, and queries for the last `tokens` of them."""

    def __init__(self, tokens: int, context: int, kv_type: int, rng: np.random.Generator, layers: int) -> None:
        block, row = 256, {F16: 2 * D, Q8_0: D // 32 * 34}[kv_type]
        count = -(-context // block)
        self.kv_type, self.block, self.start = kv_type, block, context - tokens
        size = HEADS * block * row
        self.memory = buffer((2 * count * layers * size,), np.uint8)
        addresses = self.memory.ctypes.data + size * np.arange(2 * count * layers, dtype=np.uint64)
        self.tables = addresses.reshape(layers, count, 2)
        x = rng.standard_normal((context, HEADS * D), np.float32)
        for table in self.tables:
            for which in (0, 1):
                native.store_kv(x, table, which, block, kv_type, 0, HEADS, D)
        self.q = rng.standard_normal((tokens, HEADS * D), np.float32)
        self.out = np.empty_like(self.q)
        self.read_bytes = 2 * HEADS * context * row * layers

    def run(self, layer: int) -> None:
        native.attention(self.q, self.tables[layer], self.block, self.kv_type, self.start, HEADS, D, 0, self.out)


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
    state_bytes = step.states[0].nbytes
    # A step reads and writes both states of a layer and reads the taps.
    step_bytes = 2 * sum(a.nbytes for a in step.layers[0][-2:]) + sum(a.nbytes for a in step.layers[0][:3])
    decode = {name: Attention(1, args.context, kind, rng, 2) for name, kind in (("f16", F16), ("q8_0", Q8_0))}
    prefill = Attention(args.prompt, max(args.prompt, args.context // 2), F16, rng, 1)
    same, large = (buffer((n, state_bytes // 4), np.float32) for n in (LAYERS, 256))
    reading = np.ones((8, 1 << 27), np.uint8)
    norm_x, norm_w = np.ones((1, 384), np.float32), np.ones(384, np.float32)
    norm_out = np.empty_like(norm_x)

    times: dict[str, list[float]] = {}  # seconds
    scale: dict[str, tuple[float, int]] = {}  # from seconds to the printed figure: factor, power

    def note(name: str, factor: float, power: int, work: Callable[[], object],
             clock: Callable[[], float] = time.perf_counter) -> None:
        scale[name] = factor, power
        start = clock()
        work()
        times.setdefault(name, []).append(clock() - start)

    for round_ in range(args.rounds):
        for i in range(LAYERS):
            note("update of as much GB/s", 2e-9 * state_bytes, -1, lambda i=i: _native._negate(same[i]))
        for i in range(LAYERS):
            note("state kernel GB/s", 1e-9 * step_bytes, -1, lambda i=i: step.run(i))
        for i in range(len(large)):
            note("update of 566 MB GB/s", 2e-9 * state_bytes, -1, lambda i=i: _native._negate(large[i]))
        for i in range(LAYERS):
            note("4 tokens ms, 24 layers", 1e3 * LAYERS, 1, lambda i=i: verify.run(i))
        for i in range(len(reading)):
            note("read GB/s", 1e-9 * reading[i].nbytes, -1, lambda i=i: native.read_bandwidth(reading[i]))
            for name, cache in decode.items():
                note(f"attention {name} GB/s", 1e-9 * cache.read_bytes / 2, -1, lambda i=i, c=cache: c.run(i % 2))
        note("attention prefill ms/token, 8 layers", 8e3 / args.prompt, 1, lambda: prefill.run(0))
        for i in range(0, LAYERS, 4):
            note("chunked ms/token, 24 layers", 1e3 * LAYERS / args.prompt, 1, lambda i=i: prompt.run(i))
            if round_ % 3 == 0:
                note("token by token ms/token, 24 layers", 1e3 * LAYERS / args.prompt, 1,
                     lambda i=i: prompt.run(i, chunked=False))
        native.set_threads(1)  # processor time of one thread: what a busy machine does not blur
        note("chunked processor ms/token, 24 layers", 1e3 * LAYERS / args.prompt, 1, lambda: prompt.run(0),
             time.thread_time)
        native.set_threads(args.threads)
        note("rms_norm 1 x 384 us", 1e3, 1, lambda: [native.rms_norm(norm_x, norm_w, 1e-6, norm_out)
                                                     for _ in range(1000)])

    result: dict[str, dict[str, float]] = {}
    for name, samples in times.items():
        factor, power = scale[name]
        samples.sort()
        result[name] = {"median": factor * statistics.median(samples) ** power,
                        "best": factor * samples[len(samples) // 10] ** power}
    for kernel, probes in {"state kernel GB/s": ["update of as much GB/s", "update of 566 MB GB/s"],
                           "attention f16 GB/s": ["read GB/s"], "attention q8_0 GB/s": ["read GB/s"]}.items():
        for probe in probes:
            share = {which: result[kernel][which] / result[probe][which] for which in ("median", "best")}
            result[f"{kernel[:-5]} / {probe[:-5]}"] = share
    print(f"{'':42s} {'median':>9s} {'best 10%':>9s}")
    for name, values in result.items():
        print(f"{name:42s} {values['median']:9.3f} {values['best']:9.3f}")
    print(json.dumps({"isa": native.isa(), "threads": args.threads, "context": args.context, "prompt": args.prompt,
                      **{name: {k: round(v, 4) for k, v in values.items()} for name, values in result.items()}}))


if __name__ == "__main__":
    main()
