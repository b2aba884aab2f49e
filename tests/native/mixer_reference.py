"""The maths of the mixers in float64 numpy, written as the formulas are, and inputs to try them on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from hybridlm import native

F32, F16, Q8_0 = 0, 1, 8


def every_isa() -> list[str]:
    return list(native.available())


class using:
    """Run a block under one instruction set and number of threads, then put both back."""

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        self.isa, self.threads = isa, threads

    def __enter__(self) -> None:
        self.before = native.isa(), native.threads()
        if self.isa:
            native.set_isa(self.isa)
        if self.threads:
            native.set_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        native.set_isa(self.before[0])
        native.set_threads(self.before[1])


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite where something is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-30))


# -- Gated DeltaNet ----------------------------------------------------------------------------------------------------


@dataclass
class Mixer:
    """Inputs of `native.gdn` for T tokens and the state before them."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    a: np.ndarray
    b: np.ndarray
    gate: np.ndarray
    conv_q: np.ndarray
    conv_k: np.ndarray
    conv_v: np.ndarray
    ssm_a: np.ndarray
    dt_bias: np.ndarray
    norm: np.ndarray
    conv_state: np.ndarray
    state: np.ndarray
    eps: float = 1e-5
    negative: bool = True
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = len(self.q)

    @classmethod
    def random(cls, rng: np.random.Generator, T: int, Hk: int, group: int, K: int, V: int, W: int = 4,
               negative: bool = True) -> Mixer:
        Hv = Hk * group

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return (scale * rng.standard_normal(shape)).astype(np.float32)

        return cls(
            q=normal(T, Hk * K), k=normal(T, Hk * K), v=normal(T, Hv * V), a=normal(T, Hv), b=normal(T, Hv),
            gate=normal(T, Hv * V), conv_q=normal(Hk * K, W), conv_k=normal(Hk * K, W), conv_v=normal(Hv * V, W),
            ssm_a=-np.exp(normal(Hv)), dt_bias=normal(Hv) - 3, norm=1 + normal(V, scale=0.1),
            conv_state=normal(2 * Hk * K + Hv * V, W - 1), state=normal(Hv, K, V, scale=0.3), negative=negative,
        )

    @classmethod
    def hard(cls, rng: np.random.Generator, T: int, Hk: int, group: int, K: int, V: int) -> Mixer:
        """beta within 1e-3 of 2, decay within 1e-4 of 1, and keys that differ by a part in a thousand."""
        m = cls.random(rng, T, Hk, group, K, V)
        direction = np.abs(rng.standard_normal((1, Hk * K))) + 0.5
        m.k[:] = direction * (1 + 1e-3 * rng.standard_normal(m.k.shape))
        m.conv_k[:] = 0
        m.conv_k[:, -1] = 1
        m.b[:] = 8 + rng.random(m.b.shape)
        m.ssm_a[:] = -1e-4
        return m

    def plain(self) -> Mixer:
        """The same with a norm so blunt and a gate so plain that `out` is o itself."""
        return replace(self, eps=1e20, norm=np.full_like(self.norm, 1e10), gate=np.full_like(self.gate, 1.2784645))

    def part(self, first: int, last: int) -> Mixer:
        """Tokens first .. last, sharing the state."""
        names = ("q", "k", "v", "a", "b", "gate")
        return replace(self, **{name: np.ascontiguousarray(getattr(self, name)[first:last]) for name in names})

    def fresh(self) -> Mixer:
        return replace(self, conv_state=self.conv_state.copy(), state=self.state.copy())

    def run(self, chunked: bool = True, history: np.ndarray | None = None) -> np.ndarray:
        """`native.gdn`, which moves the state on."""
        out = np.full(self.v.shape, np.nan, np.float32)
        native.gdn(self.q, self.k, self.v, self.a, self.b, self.gate, self.conv_q, self.conv_k, self.conv_v,
                   self.ssm_a, self.dt_bias, self.norm, self.conv_state, self.state, self.eps, self.negative, out,
                   chunked=chunked, history=history)
        return out

    def reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(out, conv_state, state, history) in float64; leaves this state alone."""
        x = {n: getattr(self, n).astype(np.float64) for n in ("q", "k", "v", "a", "b", "gate", "conv_q", "conv_k",
                                                               "conv_v", "ssm_a", "dt_bias", "norm", "conv_state")}
        S = self.state.astype(np.float64)
        Hv, K, V = S.shape
        T, Hk = self.tokens, self.q.shape[1] // K
        inputs = np.concatenate([x["conv_state"].T, np.concatenate([x["q"], x["k"], x["v"]], axis=1)])
        taps = np.concatenate([x["conv_q"], x["conv_k"], x["conv_v"]])
        W = taps.shape[1]
        mixed = silu(sum(inputs[w:w + T] * taps[:, w] for w in range(W)))
        q, k, v = np.split(mixed, [Hk * K, 2 * Hk * K], axis=1)
        q, k = (np.repeat(y.reshape(T, Hk, K), Hv // Hk, axis=1) for y in (q, k))
        q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(K)
        k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
        v = v.reshape(T, Hv, V)
        g = np.exp(x["ssm_a"] * np.logaddexp(0, x["a"] + x["dt_bias"]))
        beta = sigmoid(x["b"]) * (2 if self.negative else 1)
        o, history = np.empty((T, Hv, V)), np.empty((T, Hv, K, V))
        for t in range(T):
            S = g[t][:, None, None] * S
            d = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], S))
            S = S + k[t][:, :, None] * d[:, None, :]
            o[t] = np.einsum("hk,hkv->hv", q[t], S)
            history[t] = S
        normed = o / np.sqrt((o * o).mean(-1, keepdims=True) + self.eps) * x["norm"]
        out = normed.reshape(T, Hv * V) * silu(x["gate"])
        return out, inputs[T:].T, S, history


# -- attention ---------------------------------------------------------------------------------------------------------


class Store:
    """Blocks of keys and values as an engine keeps them, filled with `native.store_kv`."""

    def __init__(self, tokens: int, block: int, kv_type: int, heads: int, d: int) -> None:
        self.block, self.kv_type, self.heads, self.d = block, kv_type, heads, d
        self.row = {F32: 4 * d, F16: 2 * d, Q8_0: (d + 31) // 32 * 34}[kv_type]
        count = -(-tokens // block)
        # 0xff everywhere: NaN in float types, so reading beyond what was stored shows.
        self.memory = [np.full(heads * block * self.row, 0xFF, np.uint8) for _ in range(2 * count)]
        self.table = np.array([m.ctypes.data for m in self.memory], np.uint64).reshape(count, 2)

    def write(self, x: np.ndarray, which: int, start: int) -> None:
        native.store_kv(x, self.table, which, self.block, self.kv_type, start, self.heads, self.d)

    def read(self, which: int, tokens: int) -> np.ndarray:
        """What is stored, [tokens, heads, d] in float64."""
        blocks = [m.reshape(self.heads, self.block, self.row) for m in self.memory[which::2]]
        raw = np.concatenate(blocks, axis=1)[:, :tokens]
        if self.kv_type == F32:
            values = np.ascontiguousarray(raw).view(np.float32).astype(np.float64)
        elif self.kv_type == F16:
            values = np.ascontiguousarray(raw).view(np.float16).astype(np.float64)
        else:
            parts = np.ascontiguousarray(raw).reshape(self.heads, tokens, -1, 34)
            scale = np.ascontiguousarray(parts[..., :2]).view(np.float16).astype(np.float64)
            values = (scale * np.ascontiguousarray(parts[..., 2:]).view(np.int8)).reshape(self.heads, tokens, -1)
        return values[..., :self.d].transpose(1, 0, 2)

    def attend(self, q: np.ndarray, start: int, window: int = 0) -> np.ndarray:
        out = np.full_like(q, np.nan)
        native.attention(q, self.table, self.block, self.kv_type, start, self.heads, self.d, window, out)
        return out


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int, window: int = 0) -> np.ndarray:
    """q [T, H d] over k, v [start + T, Hkv, d], in float64."""
    T, Hkv, d = len(q), k.shape[1], k.shape[2]
    queries = q.astype(np.float64).reshape(T, -1, d)
    k, v = (np.repeat(x.astype(np.float64), queries.shape[1] // Hkv, axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", queries, k) / np.sqrt(d)
    t, s = start + np.arange(T)[:, None], np.arange(start + T)[None]
    seen = (s <= t) & ((s > t - window) if window else True)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(T, -1)


def pieces(rng: np.random.Generator, total: int) -> Iterator[tuple[int, int]]:
    """A random cut of `total` tokens."""
    at = 0
    while at < total:
        n = int(rng.choice([1, 1, 2, 7, 16, 17, 40]))
        yield at, min(total, at + n)
        at = min(total, at + n)
