"""The feed-forward layer: SwiGLU (arXiv 2002.05202), W_down(SiLU(W_gate x) * W_up x)."""

from __future__ import annotations

from torch import Tensor, nn

from hybridlm.config import HybridConfig
from hybridlm.model.layers import Linear
from hybridlm.ops import projections, swiglu

__all__ = ["MLP"]


class MLP(nn.Module):
    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(swiglu(projections(x, [self.gate_proj.weight, self.up_proj.weight])))
        return y
