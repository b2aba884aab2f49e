"""The model's operations in PyTorch: `reference` is the specification, `chunked` and `attention` the fast forms."""

from hybridlm.ops.attention import AttentionMask, attention_mask, fused_attention
from hybridlm.ops.chunked import chunk_gated_delta_rule
from hybridlm.ops.cross_entropy import cross_entropy_, linear_cross_entropy
from hybridlm.ops.pointwise import (
    add_rms_norm,
    gated_rms_norm,
    projections,
    rms_norm,
    short_convolutions,
    swiglu,
)
from hybridlm.ops.reference import (
    apply_rope,
    documents_of,
    gated_delta_rule,
    positions_of,
    rope_tables,
    short_convolution,
)

__all__ = ["AttentionMask", "add_rms_norm", "apply_rope", "attention_mask", "chunk_gated_delta_rule", "cross_entropy_",
           "documents_of", "fused_attention", "gated_delta_rule", "gated_rms_norm", "linear_cross_entropy",
           "positions_of", "projections", "rms_norm", "rope_tables", "short_convolution", "short_convolutions",
           "swiglu"]
