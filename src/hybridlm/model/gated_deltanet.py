"""Gated DeltaNet (arXiv 2412.06464) as Olmo Hybrid has it: a matrix per head as memory, rewritten at every token.

    q, k, v = SiLU(conv(W x)) each              beta = 2 sigmoid(W_b x)        (1 x without negative eigenvalues)
    g = -exp(A_log) softplus(W_a x + dt_bias)   o = gated delta rule of q, k, v, g, beta
    y = W_o (RMSNorm(o) * SiLU(W_g x))          the norm over each value head, with its own epsilon

Gates and memory are float32 whatever the activations are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.config import HybridConfig
from hybridlm.model.cache import DeltaNetCache
from hybridlm.model.layers import Linear
from hybridlm.ops import chunk_gated_delta_rule, gated_delta_rule, gated_rms_norm, projections, short_convolutions
from hybridlm.ops.reference import widen

__all__ = ["Convolution", "GatedDeltaNet"]


class Convolution(nn.Module):
    """The filters of a short convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    @property
    def taps(self) -> Tensor:
        """[C, W]."""
        return self.weight[:, 0]


class GatedDeltaNetNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)


class GatedDeltaNet(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        d, heads = config.hidden_size, config.value_heads
        keys, values = config.key_heads * config.key_dim, heads * config.value_dim
        self.key_dim, self.value_dim = config.key_dim, config.value_dim
        self.beta_scale = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.q_proj = Linear(d, keys)
        self.k_proj = Linear(d, keys)
        self.v_proj = Linear(d, values)
        self.g_proj = Linear(d, values)
        self.a_proj = Linear(d, heads)
        self.b_proj = Linear(d, heads)
        self.o_proj = Linear(values, d)
        self.q_conv1d = Convolution(keys, config.linear_conv_kernel_dim)
        self.k_conv1d = Convolution(keys, config.linear_conv_kernel_dim)
        self.v_conv1d = Convolution(values, config.linear_conv_kernel_dim)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.o_norm = GatedDeltaNetNorm(config.value_dim, config.gdn_norm_eps)

    def forward(self, x: Tensor, cache: DeltaNetCache | None = None, documents: Tensor | None = None) -> Tensor:
        past = cache or DeltaNetCache()
        qkv = projections(x, [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        (q, k, v), conv = short_convolutions(qkv, [self.q_conv1d.taps, self.k_conv1d.taps, self.v_conv1d.taps],
                                             past.conv, documents)
        q, k = (y.unflatten(-1, (-1, self.key_dim)) for y in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        a, b = widen(projections(x, [self.a_proj.weight, self.b_proj.weight])).chunk(2, -1)
        beta = b.sigmoid() * self.beta_scale
        g = -widen(self.A_log).exp() * F.softplus(a + self.dt_bias)
        rule = gated_delta_rule if x.shape[1] == 1 else chunk_gated_delta_rule
        o, state = rule(q, k, v, g, beta, initial_state=past.state, documents=documents)
        if cache is not None:
            cache.conv, cache.state = conv, state
        gate = self.g_proj(x).unflatten(-1, (-1, self.value_dim))
        y: Tensor = self.o_proj(self.o_norm(o, gate).flatten(2))
        return y
