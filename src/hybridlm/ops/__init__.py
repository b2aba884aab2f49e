"""The model's operations in PyTorch: `reference` is the specification, `chunked` and `attention` the fast forms."""

from hybridlm.ops.attention import fused_attention
from hybridlm.ops.chunked import chunk_gated_delta_rule
from hybridlm.ops.reference import (
    apply_rope,
    documents_of,
    gated_delta_rule,
    gated_rms_norm,
    positions_of,
    rms_norm,
    rope_tables,
    short_convolution,
)

__all__ = ["apply_rope", "chunk_gated_delta_rule", "documents_of", "fused_attention", "gated_delta_rule",
           "gated_rms_norm", "positions_of", "rms_norm", "rope_tables", "short_convolution"]
