"""What surrounds the matrix products of a layer: norms, SwiGLU, short convolutions, and products of several matrices.

On CUDA these are Triton kernels with their gradients, else the formulas of `reference`. In compiled code the plain norm
is a formula too: the compiler fuses it with the addition or the rotation next to it, and is as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.ops import reference
from hybridlm.ops.dispatch import HAVE_TRITON, on_triton

if HAVE_TRITON:
    from hybridlm.ops.triton import convolution, gated_norm
    from hybridlm.ops.triton import rms_norm as rms_norm_kernels
    from hybridlm.ops.triton import swiglu as swiglu_kernel

__all__ = ["add_rms_norm", "gated_rms_norm", "projections", "rms_norm", "short_convolutions", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    if on_triton(x) and not torch.compiler.is_compiling():
        return rms_norm_kernels.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    if on_triton(x):
        return rms_norm_kernels.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return reference.rms_norm(total, weight, eps), total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.gated_rms_norm`."""
    if on_triton(x):
        return gated_norm.gated_rms_norm(x, gate, weight, eps)
    return reference.gated_rms_norm(x, gate, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up, [..., F] of [..., 2 F] that holds gate and up side by side."""
    if on_triton(gate_up):
        return swiglu_kernel.swiglu(gate_up)
    return reference.swiglu(gate_up)


def short_convolutions(x: Tensor, weights: list[Tensor], state: Tensor | None = None,
                       documents: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """`reference.short_convolution` of groups of channels that lie side by side in x, each into a tensor of its own.

    x [B, T, sum of C_i], weights [C_i, W], `state` [B, W - 1, sum of C_i]. Returns the outputs [B, T, C_i] and the
    state after x.
    """
    past = weights[0].shape[1] - 1
    if on_triton(x) and past < 4:
        if state is None:
            state = x.new_zeros(x.shape[0], past, x.shape[2]) if x.shape[1] < past else x[:, :0]
            outputs = convolution.short_convolution(x, weights, None, documents)
        else:
            outputs = convolution.short_convolution(x, weights, state, documents)
        return outputs, torch.cat([state.to(x.dtype), x[:, -past:]], 1)[:, -past:]
    sizes = [w.shape[0] for w in weights]
    states = [None] * len(sizes) if state is None else state.split(sizes, -1)
    parts = [reference.short_convolution(part, weight, before, documents)
             for part, weight, before in zip(x.split(sizes, -1), weights, states, strict=True)]
    return [y for y, _ in parts], torch.cat([after for _, after in parts], -1)


def projections(x: Tensor, weights: list[Tensor]) -> Tensor:
    """x W^T of several matrices [N_i, D], side by side: [..., sum of N_i].

    Where gradients are kept it is one product with the matrices stacked, so that d x sums inside it; without, for a
    token at a time, stacking would cost more than it saves.
    """
    if torch.is_grad_enabled():
        return F.linear(x, torch.cat([w.to(x.dtype) for w in weights]))
    return torch.cat([F.linear(x, w.to(x.dtype)) for w in weights], -1)
