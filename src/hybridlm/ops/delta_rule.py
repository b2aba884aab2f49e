"""The chunked gated delta rule as one operator on NVIDIA GPUs, which `torch.compile` and CUDA graphs take whole.

The kernels are in `hybridlm.ops.cuda` for Hopper GPUs and in `hybridlm.ops.triton` for all others and for sizes the
first do not take; both are imported when first launched. For the
backward pass the CUDA kernels keep the records of all chunks (650 bytes a token and head at K = 96), the others nothing
but the inputs.
Given the same inputs, results and gradients are the same bit for bit. Lengths are read on the device only: a call
never waits for the GPU, and the grids of a packed row depend on its total length and the number of its documents.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

__all__ = ["fused_gated_delta_rule", "takes"]


@functools.cache
def _widest_key(index: int) -> int:
    """The widest key that the kernels take on a device, 0 where they don't run (Triton 3.6 can't compile the backward
    pass for sm_100). Wider keys need more shared memory than a consumer's GPU has (99 KB)."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return 0
    capability = torch.cuda.get_device_capability(index)
    if capability[0] not in (8, 9, 12):
        return 0
    return 256 if capability in ((8, 0), (8, 7), (9, 0)) else 128


@torch.compiler.assume_constant_result
def _widest(index: int) -> int:
    return _widest_key(index)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the fused operator computes this call: bfloat16 or float16 on an NVIDIA GPU of compute capability 8, 9 or
    12, K and V multiples of 16 up to 256 (K up to 128 where a block has only 99 KB of shared memory)."""
    return (v.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and q.dtype == v.dtype and k.dtype == v.dtype
            and k.shape[-1] % 16 == 0 and v.shape[-1] % 16 == 0 and 0 < v.shape[-1] <= 256 and v.shape[1] > 0
            and 0 < k.shape[-1] <= _widest(v.device.index))


def fused_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *,
                           initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
                           qk_l2norm: bool = True) -> tuple[Tensor, Tensor]:
    """`hybridlm.ops.chunk_gated_delta_rule` through the kernels, without `documents`. Shapes as there; the state is
    float32. Differentiable once, with respect to everything but cu_seqlens."""
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(v.device, torch.int32)
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    tensors = (q.contiguous(), k.contiguous(), v.contiguous(), g.float().contiguous(), beta.float().contiguous(),
               initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    o, state, _ = gated_delta_rule(*tensors, cu_seqlens, qk_l2norm, keep)
    return o, state


def _native(q: Tensor, v: Tensor) -> bool:
    from hybridlm.ops.cuda import launch

    return launch.takes(q, v)


@torch.library.custom_op("hybridlm::gated_delta_rule", mutates_args=(), device_types="cuda")
def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None,
                     cu_seqlens: Tensor | None, qk_l2norm: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All contiguous; g, beta and states float32, cu_seqlens int32. `keep`: the records of the CUDA kernels are the
    third result, else and for the Triton kernels that has no size."""
    if not _native(q, v):
        from hybridlm.ops.triton import delta_rule as portable

        o, final = portable.forward(q, k, v, g, beta, initial_state, cu_seqlens, qk_l2norm)
        return o, final, q.new_empty(0, dtype=torch.uint8)
    from hybridlm.ops.cuda import delta_rule

    records = delta_rule.prepare(q, k, v, g, beta, cu_seqlens, qk_l2norm)
    o, final = delta_rule.forward(q, k, v, g, beta, initial_state, cu_seqlens, qk_l2norm, records)
    return o, final, records if keep else q.new_empty(0, dtype=torch.uint8)


@gated_delta_rule.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None,
      cu_seqlens: Tensor | None, qk_l2norm: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, time = v.shape[:2]
    count, chunks = batch, batch * ((time + 63) // 64)
    if cu_seqlens is not None:
        count = cu_seqlens.shape[0] - 1
        chunks = chunks + count
    final = g.new_empty(count, v.shape[2], k.shape[3], v.shape[3])
    if not (keep and _native(q, v)):
        return torch.empty_like(v), final, q.new_empty(0, dtype=torch.uint8)
    from hybridlm.ops.cuda import launch

    return torch.empty_like(v), final, launch.new_records(chunks, q, v.shape[2])


@torch.library.custom_op("hybridlm::gated_delta_rule_backward", mutates_args=(), device_types="cuda")
def gated_delta_rule_backward(do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                              initial_state: Tensor | None, cu_seqlens: Tensor | None, records: Tensor, qk_l2norm: bool
                              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, g, beta and initial_state (of no size where there is none)."""
    call = do, dstate, q, k, v, g, beta, initial_state, cu_seqlens, qk_l2norm
    if _native(q, v):
        from hybridlm.ops.cuda import delta_rule

        dq, dk, dv, dg, dbeta, dinitial = delta_rule.backward(*call, records)
    else:
        from hybridlm.ops.triton import delta_rule as portable

        dq, dk, dv, dg, dbeta, dinitial = portable.backward(*call)
    return dq, dk, dv, dg, dbeta, g.new_empty(0) if dinitial is None else dinitial


@gated_delta_rule_backward.register_fake
def _(do: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
      initial_state: Tensor | None, cu_seqlens: Tensor | None, records: Tensor, qk_l2norm: bool
      ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(g), torch.empty_like(beta),
            g.new_empty(0) if initial_state is None else torch.empty_like(initial_state))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.qk_l2norm, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx, do: Tensor, dstate: Tensor, _: Tensor):
    *tensors, records = ctx.saved_tensors
    *grads, dinitial = gated_delta_rule_backward(do.contiguous(), dstate.contiguous(), *tensors, records,
                                                 ctx.qk_l2norm)
    return *grads, None if tensors[5] is None else dinitial, None, None, None


gated_delta_rule.register_autograd(_backward, setup_context=_save)
