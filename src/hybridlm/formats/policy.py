"""Which ggml type each tensor of a model gets: the one place that decides.

A model is converted "to q4_0"; that is the type of its large matrices. What is small, and what the recurrence is
sensitive to, stays in float32 whatever is asked for. `docs/file-format.md` gives the reasons.
"""

from __future__ import annotations

from hybridlm.formats.blocks import GGMLType, block_size

__all__ = ["FALLBACKS", "tensor_type"]

T = GGMLType

# For a row that is not whole blocks of 256 (such as the 5,760 wide input of the 7B's GDN output projection): the type
# of about as many bits, never fewer, with blocks of 32.
FALLBACKS: dict[GGMLType, GGMLType] = {
    T.Q6_K: T.Q8_0, T.Q5_K: T.Q5_1, T.Q4_K: T.Q5_0, T.Q3_K: T.Q4_0, T.Q2_K: T.Q4_0, T.IQ4_XS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL, T.IQ3_XXS: T.IQ4_NL, T.IQ2_S: T.IQ4_NL, T.IQ2_XS: T.IQ4_NL, T.IQ2_XXS: T.IQ4_NL,
    T.IQ1_S: T.IQ4_NL, T.IQ1_M: T.IQ4_NL, T.TQ1_0: T.Q4_0, T.TQ2_0: T.Q4_0,
}
# Quantised types with at least eight bits a weight; below, the output head is kept at q8_0.
_EIGHT_BITS = {T.Q8_0}


def tensor_type(name: str, shape: tuple[int, ...], wanted: GGMLType, *, tied: bool) -> GGMLType:
    """The type of one tensor, by GGUF name and shape (slowest axis first), in a model converted to `wanted`.

    `tied`: the input table is the output head too.
    """
    if len(shape) == 1 or "ssm_conv1d" in name or "ssm_alpha" in name or "ssm_beta" in name:
        return T.F32
    if block_size(wanted) == 1:
        return wanted
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    kind = T.Q8_0 if head and wanted not in _EIGHT_BITS else wanted
    if shape[-1] % block_size(kind):
        kind = FALLBACKS.get(kind, T.F16)
    return kind if shape[-1] % block_size(kind) == 0 else T.F16
