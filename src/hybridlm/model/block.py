"""The two kinds of block, which differ in where they norm.

    Gated DeltaNet, pre-norm:     h = x + GDN(norm(x));         y = h + MLP(norm(h))
    attention, post-norm:         h = x + norm(attention(x));   y = h + norm(MLP(h))
"""

from __future__ import annotations

from torch import Tensor, nn

from hybridlm.config import HybridConfig
from hybridlm.model.attention import Attention
from hybridlm.model.cache import DeltaNetCache, KVCache
from hybridlm.model.gated_deltanet import GatedDeltaNet
from hybridlm.model.layers import RMSNorm
from hybridlm.model.mlp import MLP
from hybridlm.ops import AttentionMask

__all__ = ["AttentionBlock", "DeltaNetBlock"]


class DeltaNetBlock(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.linear_attn = GatedDeltaNet(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: DeltaNetCache | None = None, documents: Tensor | None = None,
                rope: tuple[Tensor, Tensor] | None = None, mask: AttentionMask | None = None) -> Tensor:
        x = x + self.linear_attn(self.input_layernorm(x), cache, documents)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class AttentionBlock(nn.Module):
    def __init__(self, config: HybridConfig, window: int | None) -> None:
        super().__init__()
        self.self_attn = Attention(config, window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cache: KVCache | None = None, documents: Tensor | None = None,
                rope: tuple[Tensor, Tensor] | None = None, mask: AttentionMask | None = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, cache, documents, rope, mask))
        y: Tensor = x + self.post_feedforward_layernorm(self.mlp(x))
        return y
