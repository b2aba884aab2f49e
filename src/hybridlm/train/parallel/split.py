"""Rows too long, or heads too many, for one rank: the tokens of a row are split over `context` x `tensor` ranks.

A rank holds a contiguous stretch of each row and does by itself everything that looks at one token at a time: the
table, norms (so also those over the full width of queries and keys), projections, MLPs, the loss. Only what mixes
tokens talks to others:

    attention      heads are divided over all these ranks (Ulysses, arXiv 2309.14509): one all-to-all turns all heads of
                   own tokens into own heads of all tokens, another goes back. Masks are those of whole rows.
    Gated          heads are divided over the `tensor` ranks in the same way; over the `context` ranks the stretches
    DeltaNet       stay where they are. Over a stretch the rule is affine in the state it starts from,
                   S_out = A S_in + B; every rank works out its A and B from nothing, all learn of all, each composes
                   those before it into its own S_in, and only then computes its outputs. A convolution gets the last
                   W - 1 inputs of the stretch before.

Heads need not divide: 30 over 4 ranks are 8, 8, 7, 7. Each rank's gradient is that of its own tokens and heads; the
sum over all ranks is the gradient, for every parameter.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import ConfigError
from hybridlm.model import HybridLM
from hybridlm.model.attention import Attention
from hybridlm.model.cache import DeltaNetCache, KVCache
from hybridlm.model.gated_deltanet import GatedDeltaNet
from hybridlm.ops import (
    AttentionMask,
    apply_rope,
    chunk_gated_delta_rule,
    fused_attention,
    projections,
    short_convolutions,
)
from hybridlm.ops.reference import widen
from hybridlm.train.parallel.exchange import Group, gather, shares, to_heads, to_tokens

__all__ = ["Split", "split_model"]


class Split:
    """How rows are divided: `row` is all ranks of a row, `context` and `tensor` its two directions."""

    def __init__(self, row: Group, context: Group, tensor: Group) -> None:
        self.row, self.context, self.tensor = row, context, tensor

    def mine(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, t] of whole rows [B, T]."""
        return self._stretch(x, self.row)

    def stretch(self, x: Tensor) -> Tensor:
        """The tokens [B, T / context] that this rank's Gated DeltaNet heads read."""
        return self._stretch(x, self.context)

    @staticmethod
    def _stretch(x: Tensor, group: Group) -> Tensor:
        if x.shape[1] % group.size:
            raise ConfigError(f"sequence: {x.shape[1]} tokens do not divide among tp x cp = {group.size} ranks; give a "
                              "multiple of it")
        time = x.shape[1] // group.size
        return x[:, group.rank * time:(group.rank + 1) * time]


def split_model(model: HybridLM, split: Split) -> None:
    """Change a model in place: `hidden` still takes whole rows, and returns this rank's tokens of them."""
    config = model.config
    for what, heads, ranks in (("attention heads", config.num_attention_heads, split.row.size),
                               ("Gated DeltaNet key heads", config.key_heads, split.tensor.size)):
        if heads < ranks:
            raise ConfigError(f"tp, cp: {heads} {what} cannot be divided over {ranks} ranks")
    table = model.model.embed_tokens
    table.forward = partial(_embed, table, split)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = partial(_attention, module, split)  # type: ignore[method-assign]
        elif isinstance(module, GatedDeltaNet):
            module.forward = partial(_gated_deltanet, module, split)  # type: ignore[method-assign]


def _embed(table: nn.Module, split: Split, ids: Tensor) -> Tensor:
    return F.embedding(split.mine(ids), table.weight)  # type: ignore[arg-type]


def _attention(layer: Attention, split: Split, x: Tensor, cache: KVCache | None = None,
               documents: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None,
               mask: AttentionMask | None = None) -> Tensor:
    assert cache is None, "a split model trains; it does not decode"
    q = layer.q_norm(layer.q_proj(x)).unflatten(-1, (-1, layer.head_dim))
    k = layer.k_norm(layer.k_proj(x)).unflatten(-1, (-1, layer.head_dim))
    v = layer.v_proj(x).unflatten(-1, (-1, layer.head_dim))
    group, size = q.shape[2] // k.shape[2], split.row.size
    queries = shares(q.shape[2], size)
    keys = [(first // group, -(-end // group)) for first, end in queries]
    q, k, v = to_heads([q, k, v], [queries, keys, keys], split.row)
    if rope is not None:
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
    if k.shape[2] != q.shape[2]:  # a rank's queries may begin in the middle of a group
        first, end = queries[split.row.rank]
        own = torch.arange(first, end, device=x.device) // group - keys[split.row.rank][0]
        k, v = k[:, :, own], v[:, :, own]
    y = fused_attention(q, k, v, window=layer.window, documents=documents, mask=mask)
    out: Tensor = layer.o_proj(to_tokens(y, queries, split.row).flatten(2))
    return out


def _gated_deltanet(layer: GatedDeltaNet, split: Split, x: Tensor, cache: DeltaNetCache | None = None,
                    documents: Tensor | None = None) -> Tensor:
    assert cache is None, "a split model trains; it does not decode"
    tensor = split.tensor
    K, V = layer.key_dim, layer.value_dim
    projs = [layer.q_proj, layer.k_proj, layer.v_proj, layer.a_proj, layer.b_proj]
    widths, sizes = [K, K, V, 1, 1], [p.weight.shape[0] for p in projs]
    parts = [part.unflatten(-1, (-1, width)) for part, width in
             zip(projections(x, [p.weight for p in projs]).split(sizes, -1), widths, strict=True)]
    values, keys = parts[2].shape[2], parts[1].shape[2]
    by_key = shares(keys, tensor.size)
    by_value = [(a * values // keys, b * values // keys) for a, b in by_key]
    q, k, v, a, b = to_heads(parts, [by_key, by_key, by_value, by_value, by_value], tensor)

    kr, vr = slice(*by_key[tensor.rank]), slice(*by_value[tensor.rank])
    taps = [conv.taps.unflatten(0, (-1, width))[own].flatten(0, 1) for conv, width, own in
            ((layer.q_conv1d, K, kr), (layer.k_conv1d, K, kr), (layer.v_conv1d, V, vr))]
    here = None if documents is None else split.stretch(documents)
    qkv = torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)
    before = _tail_before(qkv, taps[0].shape[1] - 1, documents, split)
    if before is None:
        (q, k, v), _ = short_convolutions(qkv, taps, None, here)
    else:  # of this document, or zero: so they count to the first one, and only the rest of the outputs is wanted
        past = before.shape[1]
        longer = None if here is None else torch.cat([here[:, :1].expand(-1, past), here], 1)
        outputs, _ = short_convolutions(torch.cat([before, qkv], 1), taps, None, longer)
        q, k, v = (y[:, past:] for y in outputs)
    q, k, v = q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (-1, V))
    beta = widen(b[..., 0]).sigmoid() * layer.beta_scale
    g = -widen(layer.A_log[vr]).exp() * F.softplus(widen(a[..., 0]) + layer.dt_bias[vr])
    start = _state_before(q, k, v, g, beta, documents, split)
    o, _ = chunk_gated_delta_rule(q, k, v, g, beta, initial_state=start, documents=here)
    gate = layer.g_proj(x).unflatten(-1, (-1, V))
    y: Tensor = layer.o_proj(layer.o_norm(to_tokens(o, by_value, tensor), gate).flatten(2))
    return y


def _tail_before(x: Tensor, past: int, documents: Tensor | None, split: Split) -> Tensor | None:
    """The last `past` tokens of the stretch before x [B, t, C], zero where they are of other documents."""
    context = split.context
    if context.size == 1 or not past:
        return None
    if x.shape[1] < past:
        raise ConfigError(f"cp: a rank's stretch of {x.shape[1]} tokens is shorter than a convolution's {past} last "
                          "inputs; give longer sequences or fewer ranks")
    tails = gather(x[:, -past:], context)  # [context, B, past, C]
    before: Tensor = tails[context.rank - 1] * float(context.rank > 0)
    if documents is not None and context.rank:
        time = x.shape[1]
        at = context.rank * time
        same = documents[:, at - past:at] == documents[:, at:at + 1]
        # Contiguous: a document's tokens are those after the last one of another.
        same = same.flip(1).cumprod(1).flip(1)
        before = before * same[..., None].to(before.dtype)
    return before


def _state_before(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Tensor | None,
                  split: Split) -> Tensor | None:
    """The state [B, Hv, K, V] that this rank's stretch starts from, out of what all stretches do to a state."""
    context = split.context
    if context.size == 1:
        return None
    batch, time, heads, width = v.shape
    key = k.shape[-1]
    here = None if documents is None else split.stretch(documents)
    # One pass for both: the columns that start from the identity and write nothing become A, the others B.
    wide = F.pad(v, (key, 0))
    identity = F.pad(torch.eye(key, dtype=g.dtype, device=v.device), (0, width)).expand(batch, heads, -1, -1)
    _, end = chunk_gated_delta_rule(q, k, wide, g, beta, initial_state=identity.contiguous(), documents=here)
    ends = gather(end, context)
    state = torch.zeros_like(ends[0, ..., key:])
    start = state
    for other in range(context.size):
        if other == context.rank:
            start = state  # what comes later is multiplied away below
        goes_on = torch.ones(batch, device=v.device, dtype=state.dtype)
        if documents is not None and other + 1 < context.size:
            at = (other + 1) * time
            goes_on = (documents[:, at] == documents[:, at - 1]).to(state.dtype)
        state = (ends[other, ..., :key] @ state + ends[other, ..., key:]) * goes_on[:, None, None, None]
    return start + 0.0 * state  # keeps every rank's gradient in the exchange
