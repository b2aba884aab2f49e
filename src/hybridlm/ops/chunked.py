"""The gated delta rule in chunks: the same function as `reference.gated_delta_rule`, as matrix products.

Within a chunk of C tokens the writes depend on each other through a unit lower triangular system; solving it for all
chunks at once leaves a short scan that carries the state from chunk to chunk (Yang et al., arXiv 2406.06484 and
2412.06464). With G the running sum of log decays in the chunk and D_ij = exp(G_i - G_j):

    L  = beta_i D_ij k_i.k_j  for i > j         the system is (I + L) x = rhs
    U  = (I + L)^-1 (beta v)                    what the chunk would write if it started from nothing
    W  = (I + L)^-1 (beta exp(G) k)             how the state it starts from changes that: it writes U - W S
    A  = D_ij q_i.k_j         for i >= j
    o  = A U + (exp(G) q - A W) S
    S' = exp(G_C) S + R^T U - (R^T W) S         with R = exp(G_C - G) k

Precision follows the inputs. float32: Gram matrix, decays, and solve in float64, the rest in float32, because near
beta = 2 with similar keys (I + L)^-1 has entries of alternating sign that cancel (all in float32 is 50 times worse).
float64: all in float64. bfloat16 and float16, which is training on a GPU: gates, solve and state in float32, with
matrix products at the process's float32 precision. That is a choice between speed and care, measured on an H200
against float64 (rounding the result to bfloat16 costs 1.7e-3 in any case):

    torch.set_float32_matmul_precision      ordinary keys and beta      beta near 2, keys 5% apart, hardly any decay
    "highest" (PyTorch's default)           1.7e-3                      1.7e-3
    "high" (tf32 tensor cores)              1.8e-3                      3e-2

The setting reaches the float32 products of float32 inputs on a GPU too. For a model of 22M parameters "high" trains at
955,000 tokens a second (batch 64 x 2048, compiled blocks).

Nothing here depends on data or synchronises, so it compiles without graph breaks. The scan over chunks is one opaque
operator of two kernels a chunk, whatever the length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops import delta_rule
from hybridlm.ops.reference import document_starts, documents_of, l2_norm

__all__ = ["chunk_gated_delta_rule"]


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
                           initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
                           documents: Tensor | None = None, qk_l2norm: bool = True,
                           chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """The gated delta rule over T tokens, differentiable (once).

    q, k [B, T, Hk, K]; v [B, T, Hv, V]; g (log decay, <= 0) and beta [B, T, Hv], which should be float32 even where
    q, k, v are not. Returns (o [B, T, Hv, V] in v's dtype, final state [B, Hv, K, V] in float32 or float64).

    Packed rows: `documents` [B, T] (static shapes, compiles), where the final state is that of each row's last
    document; or `cu_seqlens` [N + 1] with B = 1, where states in and out are one per document [N, Hv, K, V] (this
    one reads the lengths on the host).

    bfloat16 and float16 on a GPU go to the kernels of `hybridlm.ops.delta_rule`, where these can (and where no
    `chunk_size` asks for this form).
    """
    if chunk_size is None and delta_rule.takes(q, k, v):
        if documents is not None:  # a document starts with a decay to nothing
            starts = document_starts(documents)
            starts[:, 0] = False
            g = g.masked_fill(starts[..., None], float("-inf"))
        return delta_rule.fused_gated_delta_rule(q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
                                                 qk_l2norm=qk_l2norm)
    if cu_seqlens is not None:
        return _varlen(q, k, v, g, beta, initial_state, cu_seqlens, qk_l2norm, chunk_size)
    batch, time, key_heads, key_dim = k.shape
    heads, value_dim = v.shape[2:]
    out_dtype = v.dtype
    narrow = torch.float64 if q.dtype == torch.float64 else torch.float32
    solve = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32

    if chunk_size is None:  # the solve's share grows with the chunk; a GPU prefers fewer, larger products all the same
        chunk_size = 32 if solve == torch.float64 else 64
    size = min(chunk_size, max(16, 1 << (time - 1).bit_length()))
    pad = -time % size
    if pad:  # padding writes nothing and decays nothing
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, 0, 0, pad)) for x in (g, beta))
    chunks = (time + pad) // size

    def chunked(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [N, B, H, C, ...]
        return x.unflatten(1, (chunks, size)).movedim((1, 3), (0, 2))

    q, k = chunked(q.to(solve)), chunked(k.to(solve))
    if qk_l2norm:
        q, k = l2_norm(q), l2_norm(k)
    q = q * key_dim**-0.5
    v, beta = chunked(v).to(solve), chunked(beta).to(solve)
    # exp of the floor is 0, so nothing changes but that -inf, a reset, cannot make inf - inf.
    floor = -750.0 if solve == torch.float64 else -110.0
    decay = chunked(g).to(solve).clamp_min(floor).cumsum(-1)  # G, [N, B, H, C]

    # Which pairs see each other, and which tokens still see the state at the chunk's start, or reach its end.
    mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    into, rest, carry = decay.exp(), (decay[..., -1:] - decay).exp(), decay[..., -1].exp()
    if documents is not None:
        if pad:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, pad)], 1)
        ids = documents.unflatten(1, (chunks, size)).transpose(0, 1)[:, :, None]  # [N, B, 1, C]
        before = torch.cat([ids[:1, ..., :1], ids[:-1, ..., -1:]])
        mask = mask & (ids[..., :, None] == ids[..., None, :])
        into, rest = into * (ids == before), rest * (ids == ids[..., -1:])
        carry = carry * (before == ids[..., -1:])[..., 0]
    pairs = (decay[..., :, None] - decay[..., None, :]).masked_fill(~mask, float("-inf")).exp()

    gram, scores = k @ k.mT, q @ k.mT
    if heads != key_heads:
        q, k, gram, scores = (x.repeat_interleave(heads // key_heads, dim=2) for x in (q, k, gram, scores))
    inverse = unit_lower_inverse((gram * pairs * beta[..., None]).tril(-1))
    u = (inverse @ (v * beta[..., None])).to(narrow)
    w = (inverse @ (k * (beta * into)[..., None])).to(narrow)
    scores = (scores * pairs).to(narrow)
    q, rest = (q * into[..., None]).to(narrow), (k * rest[..., None]).to(narrow)

    if initial_state is None:
        start = torch.zeros(batch * heads, key_dim, value_dim, dtype=narrow, device=q.device)
    else:
        start = initial_state.to(narrow).flatten(0, 1)
    states = chunk_scan((rest.mT @ w).flatten(1, 2), (rest.mT @ u).flatten(1, 2),
                        carry.to(narrow).flatten(1, 2)[..., None, None], start)
    states = states.unflatten(1, (batch, heads))
    o = scores @ u + (q - scores @ w) @ states[:-1]
    o = o.to(out_dtype).movedim((0, 2), (1, 3)).flatten(1, 2)
    return o[:, :time], states[-1]


def _varlen(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None,
            cu_seqlens: Tensor, qk_l2norm: bool, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Documents of one row, each into a row of its own, padded to the longest with tokens that do nothing."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    longest = max(lengths)
    ids = documents_of(cu_seqlens, q.shape[1])[0] - 1
    time = torch.arange(q.shape[1], device=q.device) - cu_seqlens[ids]

    def rows(x: Tensor) -> Tensor:
        return x.new_zeros(len(lengths), longest, *x.shape[2:]).index_put((ids, time), x[0])

    o, state = chunk_gated_delta_rule(*(rows(x) for x in (q, k, v, g, beta)), initial_state=initial_state,
                                      qk_l2norm=qk_l2norm, chunk_size=chunk_size)
    return o[ids, time][None], state


# -- the triangular system -------------------------------------------------------------------------------------------

class _UnitLowerInverse(torch.autograd.Function):
    """X = (I + L)^-1 with the closed-form derivative dL = -X^T dX X^T, so that no step of the solve is stored."""

    @staticmethod
    def forward(lower: Tensor) -> Tensor:
        return _invert(lower)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -(x.mT @ grad @ x.mT).tril(-1)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L [..., C, C], C a power of two."""
    return _UnitLowerInverse.apply(lower)


def _invert(lower: Tensor) -> Tensor:
    """By doubling: the inverse of [[a, 0], [b, d]] is [[a', 0], [-d' b a', d']], from 1 x 1 blocks upwards.

    As stable as forward substitution, but log2(C) rounds of batched products (a batched triangular solve on a GPU is
    many times slower). Small blocks are multiplied element by element, which compiles to a few fused kernels and
    stays exact float32 where matrix products are set to tf32.
    """
    size = lower.shape[-1]
    x = torch.ones(*lower.shape[:-2], size, 1, 1, dtype=lower.dtype, device=lower.device)  # [..., blocks, s, s]
    width = 1
    while width < size:
        blocks = lower.unflatten(-1, (-1, 2 * width)).unflatten(-3, (-1, 2 * width))
        b = blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., width:, :width]
        a, d = x[..., 0::2, :, :], x[..., 1::2, :, :]
        y = -_product(_product(d, b), a)
        x = torch.cat([torch.cat([a, torch.zeros_like(y)], -1), torch.cat([y, d], -1)], -2)
        width *= 2
    return x.squeeze(-3)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, element by element below 16 x 16."""
    size = a.shape[-1]
    if size >= 16:
        return a @ b
    return sum((a[..., :, i:i + 1] * b[..., i:i + 1, :] for i in range(1, size)), a[..., :, :1] * b[..., :1, :])


# -- the scan over chunks --------------------------------------------------------------------------------------------

@torch.library.custom_op("hybridlm::chunk_scan", mutates_args=())
def chunk_scan(erase: Tensor, write: Tensor, carry: Tensor, start: Tensor) -> Tensor:
    """S_{n+1} = carry_n S_n - erase_n S_n + write_n from S_0 = start.

    erase [N, b, K, K], write [N, b, K, V], carry [N, b, 1, 1], start [b, K, V]. Returns all states [N + 1, b, K, V].
    """
    chunks = erase.shape[0]
    states = start.new_empty(chunks + 1, *start.shape)
    states[0] = start
    for n in range(chunks):
        torch.baddbmm(write[n], erase[n], states[n], alpha=-1, out=states[n + 1])
        states[n + 1].addcmul_(carry[n], states[n])
    return states


@chunk_scan.register_fake
def _(erase: Tensor, write: Tensor, carry: Tensor, start: Tensor) -> Tensor:
    return start.new_empty(erase.shape[0] + 1, *start.shape)


@torch.library.custom_op("hybridlm::chunk_scan_backward", mutates_args=())
def chunk_scan_backward(grad: Tensor, erase: Tensor, carry: Tensor) -> Tensor:
    """Gradients of all states [N + 1, b, K, V], from the gradients `grad` that reach each from outside the scan."""
    total = torch.empty_like(grad, memory_format=torch.contiguous_format)
    total[-1] = grad[-1]
    for n in range(erase.shape[0] - 1, -1, -1):
        torch.baddbmm(grad[n], erase[n].mT, total[n + 1], alpha=-1, out=total[n])
        total[n].addcmul_(carry[n], total[n + 1])
    return total


@chunk_scan_backward.register_fake
def _(grad: Tensor, erase: Tensor, carry: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    erase, _, carry, _ = inputs
    ctx.save_for_backward(erase, carry, output)


def _backward(ctx, grad: Tensor):
    erase, carry, states = ctx.saved_tensors
    total = chunk_scan_backward(grad, erase, carry)
    later, before = total[1:], states[:-1]
    return -(later @ before.mT), later, (later * before).sum((-2, -1), keepdim=True), total[0]


chunk_scan.register_autograd(_backward, setup_context=_save)
