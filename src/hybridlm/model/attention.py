"""Causal softmax attention as in Olmo 2 and 3: queries and keys are normed over their full width, before the heads
are split; rotary embedding or none; grouped key/value heads; optionally only the last `window` tokens. No gate, no
bias.
"""

from __future__ import annotations

from torch import Tensor, nn

from hybridlm.config import HybridConfig
from hybridlm.model.cache import KVCache
from hybridlm.model.layers import Linear, RMSNorm
from hybridlm.ops import AttentionMask, apply_rope, fused_attention

__all__ = ["Attention"]


class Attention(nn.Module):
    def __init__(self, config: HybridConfig, window: int | None) -> None:
        super().__init__()
        d, kv = config.hidden_size, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.window = window
        self.q_proj = Linear(d, d)
        self.k_proj = Linear(d, kv)
        self.v_proj = Linear(d, kv)
        self.o_proj = Linear(d, d)
        self.q_norm = RMSNorm(d, config.rms_norm_eps)
        self.k_norm = RMSNorm(kv, config.rms_norm_eps)

    def forward(self, x: Tensor, cache: KVCache | None = None, documents: Tensor | None = None,
                rope: tuple[Tensor, Tensor] | None = None, mask: AttentionMask | None = None) -> Tensor:
        q = self.q_norm(self.q_proj(x)).unflatten(-1, (-1, self.head_dim))
        k = self.k_norm(self.k_proj(x)).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.append(k, v)
        y: Tensor = self.o_proj(fused_attention(q, k, v, window=self.window, documents=documents, mask=mask).flatten(2))
        return y
