"""The model's mathematics in plain PyTorch, a function a formula: the specification that fast paths are held to.

Everything computes in at least float32 and in float64 when given float64, so a float64 run of the whole model is the
yardstick for all others. Results have the input's dtype. Shapes in the field's letters: B batch, T time, H heads
(Hk key heads, Hv value heads), K key width, V value width, D model width, C channels, W convolution width.

Several documents in one row must not see each other. There are two ways to say where they are:

    cu_seqlens  int [N + 1], 0 = first start, ascending, last = T: for a batch of one row, whose N documents have
                whatever length; what variable-length kernels take
    documents   int [B, T], the number of the document that a token belongs to, equal over one contiguous stretch and
                different between neighbours: static shapes, so it can be compiled

`documents_of` makes the second out of the first, and both give the same numbers.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["apply_rope", "attention", "causal_mask", "cross_entropy", "documents_of", "gated_delta_rule",
           "gated_rms_norm", "l2_norm", "positions_of", "rms_norm", "rope_tables", "short_convolution", "swiglu",
           "widen"]


def widen(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


# -- normalisation ---------------------------------------------------------------------------------------------------

def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last axis; the weight is applied before rounding to x's dtype."""
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(x) * SiLU(gate), the norm before the gate, rounded once at the end."""
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight * F.silu(widen(gate))).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis: eps is on the sum."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + eps)).to(x.dtype)


# -- feed-forward and loss -------------------------------------------------------------------------------------------

def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, [..., F] of [..., 2 F] that holds gate and up side by side (arXiv 2002.05202)."""
    gate, up = widen(gate_up).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, z: float = 0.0) -> Tensor:
    """-log softmax(row)[target] + z logsumexp(row)^2 of each row of logits [N, V]: [N], 0 where the target is < 0."""
    wide = widen(logits)
    total = wide.logsumexp(-1)
    picked = wide.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    return (total - picked + z * total.square()) * (targets >= 0)


# -- packed documents ------------------------------------------------------------------------------------------------

def documents_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """`documents` [1, total] of a row that `cu_seqlens` divides. Repeated entries (empty documents) are allowed."""
    time = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, time, right=True)[None]


def document_starts(documents: Tensor) -> Tensor:
    """bool [B, T], true where a token's document differs from that of the token before it, and at time 0."""
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    return torch.cat([first, documents[:, 1:] != documents[:, :-1]], dim=1)


def positions_of(documents: Tensor) -> Tensor:
    """int [B, T], each token's position within its document."""
    time = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return time - (time * document_starts(documents)).cummax(dim=1).values


# -- short convolution -----------------------------------------------------------------------------------------------

def short_convolution(x: Tensor, weight: Tensor, state: Tensor | None = None,
                      documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SiLU of a causal convolution of each channel with its own filter; no bias.

    x [B, T, C], weight [C, W] with the newest tap last, `state` [B, W - 1, C] the inputs before x (None: zeros).
    Returns y [B, T, C] and the state after x.
    """
    batch, time, channels = x.shape
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, width - 1, channels)
    past = torch.cat([state.to(x.dtype), x], dim=1)
    taps = widen(weight)
    y = widen(x) * taps[:, -1]
    for back in range(1, width):
        shifted = widen(past[:, width - 1 - back:width - 1 - back + time])
        if documents is not None:  # an input of another document counts as zero, like one before the start
            same = F.pad(documents[:, back:] == documents[:, :-back], (min(back, time), 0)) if back < time else \
                torch.zeros_like(documents, dtype=torch.bool)
            shifted = shifted * same[:, :, None]
        y = y + shifted * taps[:, width - 1 - back]
    return F.silu(y).to(x.dtype), past[:, time:]


# -- gated delta rule ------------------------------------------------------------------------------------------------

def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, initial_state: Tensor | None = None,
                     cu_seqlens: Tensor | None = None, documents: Tensor | None = None,
                     qk_l2norm: bool = True) -> tuple[Tensor, Tensor]:
    """The gated delta rule token by token (Gated DeltaNet, arXiv 2412.06464).

        S <- exp(g_t) S;  S <- S + k_t beta_t (v_t - k_t^T S)^T;  o_t = S^T q_t / sqrt(K)

    q, k [B, T, Hk, K]; v [B, T, Hv, V]; g (log decay, <= 0) and beta [B, T, Hv]. Key head h serves the value heads
    h Hv/Hk ... (h + 1) Hv/Hk - 1. With `qk_l2norm` q and k are scaled to unit length first. `initial_state` and the
    returned final state are [B, Hv, K, V], with `cu_seqlens` one per document [N, Hv, K, V].

    Returns (o [B, T, Hv, V] in v's dtype, final state in float32, or float64 for float64 inputs).
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        parts = [gated_delta_rule(*(x[:, a:b] for x in (q, k, v, g, beta)), qk_l2norm=qk_l2norm,
                                  initial_state=None if initial_state is None else initial_state[n:n + 1])
                 for n, (a, b) in enumerate(pairwise(bounds))]
        return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 0)
    batch, time, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[2:]
    out_dtype = v.dtype
    q, k, v, g, beta = (widen(x) for x in (q, k, v, g, beta))
    if qk_l2norm:
        q, k = l2_norm(q), l2_norm(k)
    q = q * key_dim**-0.5
    if heads != key_heads:
        q, k = (x.repeat_interleave(heads // key_heads, dim=2) for x in (q, k))
    state = v.new_zeros(batch, heads, key_dim, value_dim) if initial_state is None else initial_state.to(v.dtype)
    starts = None if documents is None else document_starts(documents)
    outputs = []
    for t in range(time):
        if starts is not None and t > 0:
            state = state.masked_fill(starts[:, t, None, None, None], 0)
        state = state * g[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return o.to(out_dtype), state


# -- attention -------------------------------------------------------------------------------------------------------

def rope_tables(inv_freq: Tensor, positions: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [..., head_dim / 2] of position * frequency, times YaRN's factor; in inv_freq's dtype."""
    angles = positions[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x [B, T, H, d] by the angles of cos and sin [B or 1, T, d/2]."""
    a, b = widen(x).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def causal_mask(queries: int, keys: int, *, window: int | None = None, documents: Tensor | None = None,
                device: torch.device | None = None) -> Tensor:
    """bool, true where a query may look: [queries, keys], or [B, 1, queries, keys] with `documents`.

    The last query stands at the last key. With a window w a query sees itself and the w - 1 keys before it.
    """
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    mask = distance >= 0
    if window is not None:
        mask = mask & (distance < window)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask


def attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None,
              documents: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that `causal_mask` allows.

    q [B, T, H, d]; k, v [B, S, Hkv, d] with S >= T, where the first S - T keys come from a cache; each key head
    serves H / Hkv neighbouring query heads. Returns [B, T, H, d].
    """
    if cu_seqlens is not None:
        documents = documents_of(cu_seqlens, q.shape[1])
    mask = causal_mask(q.shape[1], k.shape[1], window=window, documents=documents, device=q.device)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", widen(q), widen(k)) * q.shape[-1]**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, widen(v)).to(q.dtype)
