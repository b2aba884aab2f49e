"""transformers' `OlmoHybridForCausalLM` on this project's operations, by one import:

    import hybridlm.integrations.transformers      # before or after models are made
    model = AutoModelForCausalLM.from_pretrained("allenai/Olmo-Hybrid-7B", dtype="bfloat16", device_map="cuda")

The functions that transformers itself exchanges for kernels of other packages (the delta rule, the convolution) and
the forward of its two norms are replaced, for training as for generation; weights, names and results stay. On a GPU
that means Triton kernels for any head width, gradients included, and packed rows (`cu_seq_lens_q`, `seq_idx`) that keep
their documents apart; on a CPU the PyTorch forms. `disable()` gives transformers its own back. Works with
transformers 5.17 to 5.23.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hybridlm import ops
from hybridlm.errors import HybridLMError

try:
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as theirs
except ImportError:
    raise HybridLMError("transformers: no olmo_hybrid in it; install transformers 5.17 or later "
                        "(pip install -U transformers)") from None

__all__ = ["disable", "enable"]


def chunk_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
                           chunk_size: int = 64, initial_state: Tensor | None = None,
                           output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
                           cu_seqlens: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor | None]:
    """The arguments of transformers' function; `chunk_size` is ours to choose."""
    o, state = ops.chunk_gated_delta_rule(query, key, value, g.float(), beta.float(), initial_state=initial_state,
                                          cu_seqlens=cu_seqlens, qk_l2norm=use_qk_l2norm_in_kernel)
    return o, state if output_final_state else None


def recurrent_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
                               initial_state: Tensor | None = None, output_final_state: bool = False,
                               use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
                               **_: Any) -> tuple[Tensor, Tensor | None]:
    """One token, or a few."""
    o, state = ops.gated_delta_rule(query, key, value, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens,
                                    qk_l2norm=use_qk_l2norm_in_kernel)
    return o, state if output_final_state else None


def causal_conv1d_fn(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
                     seq_idx: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **kwargs: Any) -> Tensor:
    """[B, C, T] in and out, which transformers keeps transposed: time by channels in memory, as ours has it."""
    if bias is not None or activation not in ("silu", "swish"):
        return _ORIGINAL["causal_conv1d_fn"](hidden_states, weight, bias=bias, activation=activation, **kwargs)
    documents = seq_idx
    if documents is None and cu_seq_lens_q is not None:
        documents = ops.documents_of(cu_seq_lens_q, hidden_states.shape[-1])
    (y,), _ = ops.short_convolutions(hidden_states.transpose(1, 2), [weight], documents=documents)
    return y.transpose(1, 2)


def causal_conv1d_update(hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
                         activation: str | None = None) -> Tensor:
    """One token [B, C, 1]; `conv_state` [B, C, W] moves on in place."""
    if bias is not None or activation not in ("silu", "swish") or hidden_states.shape[-1] != 1:
        return _ORIGINAL["causal_conv1d_update"](hidden_states, conv_state, weight, bias, activation)
    conv_state.copy_(conv_state.roll(-1, -1))
    conv_state[:, :, -1:] = hidden_states
    y = (conv_state[:, :, -weight.shape[1]:].float() * weight.float()).sum(-1, keepdim=True)
    return F.silu(y).to(hidden_states.dtype)


def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def gated_rms_norm(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    return ops.gated_rms_norm(hidden_states, gate, self.weight, self.variance_epsilon)


_FUNCTIONS = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_gated_delta_rule,
    "causal_conv1d_fn": causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d_update,
}
_NORMS = {"OlmoHybridRMSNorm": rms_norm, "OlmoHybridRMSNormGated": gated_rms_norm}
_missing = [name for name in (*_FUNCTIONS, *_NORMS) if not hasattr(theirs, name)]
if _missing:
    raise HybridLMError(f"transformers: its olmo_hybrid has no {', '.join(_missing)}, so its operations cannot be "
                        "replaced; use transformers 5.17 to 5.23")
_ORIGINAL: dict[str, Any] = {**{name: getattr(theirs, name) for name in _FUNCTIONS},
                             **{name: getattr(theirs, name).forward for name in _NORMS}}


def enable() -> None:
    """Replace transformers' operations; importing this module has done so."""
    for name, function in _FUNCTIONS.items():
        setattr(theirs, name, function)
    for name, forward in _NORMS.items():
        getattr(theirs, name).forward = forward


def disable() -> None:
    """Give transformers its own operations back."""
    for name in _FUNCTIONS:
        setattr(theirs, name, _ORIGINAL[name])
    for name in _NORMS:
        getattr(theirs, name).forward = _ORIGINAL[name]


enable()
