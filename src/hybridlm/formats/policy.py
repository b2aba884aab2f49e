"""Which ggml type each tensor of a model gets: the one place that decides.

A model is converted "to q4_0"; that is the type of its large matrices. Or to a mix, "q4_m", which spends more bits
where measurement says that they help most. What is small, and what the recurrence is sensitive to, stays in float32
whatever is asked for. `docs/quantisation.md` has the measurements, `docs/file-format.md` the reasons for float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType, block_size, type_of

__all__ = ["FALLBACKS", "MIXES", "Mix", "base_type", "recipe", "tensor_type"]

T = GGMLType

# For a row that is not whole blocks of 256 (such as the 5,760 wide input of the 7B's GDN output projection): a type
# with blocks of 32 that has about as many bits, never fewer, and that the runtime multiplies by.
FALLBACKS: dict[GGMLType, GGMLType] = {
    T.Q6_K: T.Q8_0, T.Q5_K: T.Q5_0, T.Q4_K: T.Q5_0, T.Q3_K: T.Q4_0, T.Q2_K: T.Q4_0, T.IQ4_XS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL, T.IQ3_XXS: T.IQ4_NL, T.IQ2_S: T.IQ4_NL, T.IQ2_XS: T.IQ4_NL, T.IQ2_XXS: T.IQ4_NL,
    T.IQ1_S: T.IQ4_NL, T.IQ1_M: T.IQ4_NL, T.TQ1_0: T.Q4_0, T.TQ2_0: T.Q4_0,
}
# Quantised types with at least eight bits a weight; below, the output head is kept at q8_0.
_EIGHT_BITS = {T.Q8_0}


@dataclass(frozen=True, slots=True)
class Mix:
    """Types by role, the part of a tensor's name that says what it does ("ffn_down"; "head" is the output head)."""

    name: str
    base: GGMLType  # of roles that are not named
    roles: Mapping[str, GGMLType] = field(default_factory=dict)


# Chosen by KL divergence on a trained model, bits being those of the 7B (docs/quantisation.md). What is most sensitive
# for its size: GDN's output projection, the input table, which decoding does not read, then values and gates.
MIXES: dict[str, Mix] = {m.name: m for m in (
    Mix("q4_s", T.Q4_K, {"ssm_out": T.Q5_0, "token_embd": T.Q5_K, "head": T.Q5_K}),  # 4.70
    Mix("q4_m", T.Q4_K, {"ssm_out": T.Q5_0, "token_embd": T.Q5_K, "head": T.Q5_K,
                         "attn_v": T.Q5_K, "attn_gate": T.Q5_K, "attn_output": T.Q5_K}),  # 4.88
    Mix("q5_m", T.Q5_K, {"ssm_out": T.Q5_0, "token_embd": T.Q6_K, "head": T.Q6_K}),  # 5.63
    Mix("q6_m", T.Q6_K, {"ssm_out": T.Q8_0}),  # 6.72
)}


def recipe(name: str | int) -> GGMLType | Mix:
    """What a user's word asks for: a mix or a type. Raises `FormatError` for neither."""
    try:
        return MIXES.get(str(name).lower()) or type_of(name)
    except FormatError as error:
        raise FormatError(f"{error}; and the mixes {', '.join(MIXES)}") from None


def base_type(wanted: GGMLType | Mix) -> GGMLType:
    """The type of most weights."""
    return wanted.base if isinstance(wanted, Mix) else wanted


def tensor_type(name: str, shape: tuple[int, ...], wanted: GGMLType | Mix, *, tied: bool) -> GGMLType:
    """The type of one tensor, by GGUF name and shape (slowest axis first), in a model converted to `wanted`.

    `tied`: the input table is the output head too.
    """
    if len(shape) == 1 or "ssm_conv1d" in name or "ssm_alpha" in name or "ssm_beta" in name:
        return T.F32
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    if isinstance(wanted, Mix):
        kind = wanted.roles.get("head" if head else name.split(".")[-2], wanted.base)
    elif block_size(wanted) == 1:
        return wanted
    else:
        kind = T.Q8_0 if head and wanted not in _EIGHT_BITS else wanted
    if shape[-1] % block_size(kind):
        kind = FALLBACKS.get(kind, T.F16)
    return kind if shape[-1] % block_size(kind) == 0 else T.F16
