"""Decode kernels against plain PyTorch, on any device: the interpreter's, in the CPU's tests, and a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hybridlm.ops.reference import (
    apply_rope,
    attention,
    gated_delta_rule,
    gated_rms_norm,
    rms_norm,
    rope_tables,
    short_convolution,
)
from hybridlm.ops.triton import decode, gemv, paged_attention

PAGE = paged_attention.PAGE.value


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def gdn(rows: int, HK: int, HV: int, K: int, V: int, *, W: int = 4, layers: int = 2, dtype=torch.float32,
        device="cpu", seed: int = 0, warps: int = 4) -> dict[str, float]:
    """One step of the second layer from random memory; row 1, if there is one, only fills up. Relative errors."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    channels, layer = 2 * HK * K + HV * V, layers - 1
    x = rand(rows, channels + HV * V + 2 * HV).to(dtype).to(device)
    q, k, v, gate, a, b = x.split([HK * K, HK * K, HV * V, HV * V, HV, HV], 1)
    taps = (0.5 * rand(W, channels)).to(device).split([HK * K, HK * K, HV * V], 1)
    ssm_a, dt = -torch.rand(HV, generator=g).mul(16).to(device), rand(HV).to(device) - 3
    norm = (1 + 0.1 * rand(V)).to(device)
    states = [rand(layers, HV, K, V).to(device) for _ in range(rows)]
    rings = [rand(layers, W, channels).to(dtype).to(device) for _ in range(rows)]
    positions = torch.randint(W, 1000, (rows,), generator=g).to(device)
    skip = 1 if rows > 1 else -1
    address = torch.tensor([0 if r == skip else s.data_ptr() for r, s in enumerate(states)], device=device)
    ring_at = torch.tensor([r.data_ptr() for r in rings], device=device)
    before = [s.clone() for s in states], [r.clone() for r in rings]
    out = torch.zeros(rows, HV * V, dtype=dtype, device=device)
    decode.gdn_decode(q, k, v, a, b, gate, tuple(taps), ssm_a, dt, norm, address, ring_at, positions, out, layer=layer,
                      heads=(HK, HV), eps=1e-5, strength=2.0, num_warps=warps)
    worst = {"out": 0.0, "state": 0.0, "ring": 0.0}
    for r in range(rows):
        p = int(positions[r])
        past = torch.stack([before[1][r][layer, (p - back) % W] for back in range(W - 1, 0, -1)])[None].double()
        mixed, _ = short_convolution(x[r, :channels].double()[None, None], torch.cat(taps, 1).T.double(), past)
        qd, kd, vd = mixed.split([HK * K, HK * K, HV * V], -1)
        log_decay = ssm_a.double() * F.softplus(a[r].double() + dt.double())
        o, s = gated_delta_rule(qd.view(1, 1, HK, K), kd.view(1, 1, HK, K), vd.view(1, 1, HV, V),
                                log_decay[None, None], 2 * b[r].double().sigmoid()[None, None],
                                initial_state=before[0][r][layer].double()[None])
        o = gated_rms_norm(o, gate[r].double().view(1, 1, HV, V), norm.double(), 1e-5).flatten()
        expected = before[0][r].double()
        ring = before[1][r].clone()
        if r == skip:
            o = torch.zeros_like(o)
        else:
            expected[layer] = s[0]
            ring[layer, p % W] = x[r, :channels]
        worst["out"] = max(worst["out"], relative(out[r], o) if r != skip else float(out[r].abs().max()))
        worst["state"] = max(worst["state"], relative(states[r], expected))
        worst["ring"] = max(worst["ring"], relative(rings[r], ring))
    return worst


def linear(M: int, N: int, K: int, *, split: int = 1, glu: bool = False, dtype=torch.float32, device="cpu",
           block=(64, 64), **options) -> float:
    """Relative error of a skinny product."""
    g = torch.Generator().manual_seed(M + N + K)
    x = torch.randn(M, K, generator=g).to(dtype).to(device)
    w = (torch.randn(N * (2 if glu else 1), K, generator=g) / K**0.5).to(dtype).to(device)
    work = gemv.Workspace(device, 1 << 20, 1 << 10)
    y = [gemv.skinny_linear(x, w, work, glu=N if glu else 0, block=block, split=split, **options) for _ in range(2)]
    assert torch.equal(y[0], y[1])
    assert not work.counters.any()
    z = x.double() @ w.double().T
    if glu:
        z = F.silu(z[:, :N]) * z[:, N:]
    return relative(y[0], z)


def same_in_any_company(N: int, K: int, *, split: int = 1, glu: bool = False, dtype=torch.float32, device="cpu",
                        block=(64, 64), rows=(1, 3, 16, 17, 33, 64, 65, 200)) -> list[bool]:
    """Whether the first row's product is the same in every bit among so many rows as alone."""
    g = torch.Generator().manual_seed(N + K)
    x = torch.randn(max(rows), K, generator=g).to(dtype).to(device)
    w = (torch.randn(N * (2 if glu else 1), K, generator=g) / K**0.5).to(dtype).to(device)
    work = gemv.Workspace(device, 1 << 22, 1 << 12)
    y = [gemv.skinny_linear(x[:M], w, work, glu=N if glu else 0, block=block, split=split) for M in rows]
    return [torch.equal(y[0][0], z[0]) for z in y]


def pages(rng: torch.Generator, count: int, layers: int, heads: int, width: int, dtype, device):
    """Pages in random order of memory, and the table of their addresses."""
    found = [torch.randn(layers, 2, heads, PAGE, width, generator=rng).to(dtype).to(device) for _ in range(count)]
    return found, torch.tensor([p.data_ptr() for p in found], device=device)


def paged(lengths: list[int], H: int, HKV: int, d: int, *, window: int = 0, rope: bool = True, dtype=torch.float32,
          device="cpu") -> dict[str, float]:
    """Store one token for each row, then attend; row 1, if there is one, only fills up. Relative errors."""
    g = torch.Generator().manual_seed(sum(lengths))
    rows, layers, layer, skip = len(lengths), 2, 1, 1 if len(lengths) > 1 else -1
    made = [pages(g, -(-n // PAGE), layers, HKV, d, dtype, device) for n in lengths]
    tables = torch.tensor([0 if r == skip else t.data_ptr() for r, (_, t) in enumerate(made)], device=device)
    positions = torch.tensor([n - 1 for n in lengths], device=device)
    x = torch.randn(rows, (H + 2 * HKV) * d, generator=g).to(dtype).to(device)
    q, k, v = x.split([H * d, HKV * d, HKV * d], 1)
    wq, wk = (1 + 0.1 * torch.randn(n * d, generator=g).to(device) for n in (H, HKV))
    freq = 1 / 10_000 ** (torch.arange(0, d, 2, device=device) / d) if rope else None
    q_out, out = (torch.zeros(rows, H * d, dtype=dtype, device=device) for _ in range(2))
    floats, ints = paged_attention.attention_room(rows, H, HKV, d)
    parts, counters = torch.empty(floats, device=device), torch.zeros(ints, dtype=torch.int32, device=device)
    paged_attention.store_qkv(q, k, v, wq, wk, freq, tables, positions, q_out, layer=layer, width=d, eps=1e-6,
                              rope_scale=1.0, dtype=dtype)
    paged_attention.decode_attention(q_out, tables, positions, out, parts, counters, layer=layer, kv_heads=HKV,
                                     width=d, window=window, dtype=dtype)
    assert not counters.any()
    worst = {"q": 0.0, "k": 0.0, "v": 0.0, "out": 0.0, "gather": 0.0}
    for r, n in enumerate(lengths):
        if r == skip:
            worst["out"] = max(worst["out"], float(out[r].abs().max()))
            continue
        qn, kn = rms_norm(q[r].double(), wq.double(), 1e-6), rms_norm(k[r].double(), wk.double(), 1e-6)
        qn, kn = qn.view(1, 1, H, d), kn.view(1, 1, HKV, d)
        if rope:
            cos, sin = rope_tables(freq.double(), positions[r:r + 1])
            qn, kn = apply_rope(qn, cos[None], sin[None]), apply_rope(kn, cos[None], sin[None])
        stored = torch.cat([p[layer] for p in made[r][0]], 2)  # [2, HKV, tokens, d]
        worst["q"] = max(worst["q"], relative(q_out[r], qn.flatten()))
        worst["k"] = max(worst["k"], relative(stored[0, :, n - 1], kn[0, 0]))
        worst["v"] = max(worst["v"], relative(stored[1, :, n - 1], v[r].view(HKV, d)))
        found = paged_attention.gather_pages(made[r][1], 0, len(made[r][0]), layer=layer, kv_heads=HKV, width=d,
                                             dtype=dtype)
        worst["gather"] = max(worst["gather"], float((found.float() - stored.float()).abs().max()))
        o = attention(q_out[r].double().view(1, 1, H, d), *(s[:, :n].transpose(0, 1)[None].double() for s in stored),
                      window=window or None)
        worst["out"] = max(worst["out"], relative(out[r], o.flatten()))
    return worst


def add_norm(rows: int, width: int, *, dtype=torch.float32, device="cpu") -> float:
    """All forms of the fused residual sum and norm; the largest relative error."""
    g = torch.Generator().manual_seed(rows + width)
    x, y = (torch.randn(rows, width, generator=g).to(dtype).to(device) for _ in range(2))
    w, inner = (1 + 0.1 * torch.randn(width, generator=g).to(device) for _ in range(2))
    worst = relative(decode.add_norm(x, None, w, 1e-6), rms_norm(x.double(), w.double(), 1e-6))
    for inside in (None, inner):
        for weight in (None, w):
            s = x.clone()
            z = decode.add_norm(s, y, weight, 1e-6, inside, 1e-5)
            t = y.double() if inside is None else rms_norm(y.double(), inside.double(), 1e-5)
            worst = max(worst, relative(s, x.double() + t))
            if weight is None:
                assert z is None
            else:
                worst = max(worst, relative(z, rms_norm(s.double(), weight.double(), 1e-6)))
    return worst
