"""The weights that the walk reads, by role, and `bind`, which asks a device's loader for each by its GGUF name.

Whatever the loader returns (a view of quantised blocks, a tensor on a device) is passed back to that device's
operations untouched. Names and shapes that a model must have are written here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from hybridlm.config import LINEAR, HybridConfig

__all__ = ["MLP", "AttentionLayer", "DeltaNetLayer", "Loader", "Weights", "bind", "expected_tensors", "read_each_step"]

# (name, shape in torch order, is a matrix). Matrices may be quantised; the others are vectors and convolution taps,
# which every device holds in float32.
Loader = Callable[[str, tuple[int, ...], bool], Any]


@dataclass(frozen=True, slots=True)
class MLP:
    gate: Any  # [F, D]
    up: Any  # [F, D]
    down: Any  # [D, F]


@dataclass(frozen=True, slots=True)
class DeltaNetLayer:
    """One Gated DeltaNet block. Hk key heads of width K, Hv value heads of width V, convolution width W."""

    attn_norm: Any  # [D], before the mixer
    q: Any  # [Hk K, D]
    k: Any  # [Hk K, D]
    v: Any  # [Hv V, D]
    gate: Any  # [Hv V, D]
    a: Any  # [Hv, D], decay
    b: Any  # [Hv, D], write strength
    conv_q: Any  # [Hk K, W]
    conv_k: Any  # [Hk K, W]
    conv_v: Any  # [Hv V, W]
    ssm_a: Any  # [Hv], -exp(A_log)
    dt_bias: Any  # [Hv]
    norm: Any  # [V], of the output, per head
    out: Any  # [D, Hv V]
    ffn_norm: Any  # [D], before the MLP
    mlp: MLP


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention block."""

    q: Any  # [D, D]
    k: Any  # [Hkv d, D]
    v: Any  # [Hkv d, D]
    q_norm: Any  # [D]
    k_norm: Any  # [Hkv d]
    out: Any  # [D, D]
    attn_norm: Any  # [D], after the mixer
    ffn_norm: Any  # [D], after the MLP
    mlp: MLP


@dataclass(frozen=True, slots=True)
class Weights:
    config: HybridConfig
    embed: Any  # [vocab, D]
    layers: tuple[DeltaNetLayer | AttentionLayer, ...]
    norm: Any  # [D]
    head: Any  # [vocab, D]; the same handle as `embed` when tied


def bind(config: HybridConfig, load: Loader) -> Weights:
    """Ask `load` for every tensor of the model, in file order, and arrange what it returns."""
    d, ff = config.hidden_size, config.intermediate_size
    keys, values = config.key_heads * config.key_dim, config.value_heads * config.value_dim
    kv, width = config.kv_heads * config.head_dim, config.linear_conv_kernel_dim

    def mlp(blk: str) -> MLP:
        return MLP(load(f"{blk}.ffn_gate.weight", (ff, d), True), load(f"{blk}.ffn_up.weight", (ff, d), True),
                   load(f"{blk}.ffn_down.weight", (d, ff), True))

    def gdn(blk: str) -> DeltaNetLayer:
        return DeltaNetLayer(
            attn_norm=load(f"{blk}.attn_norm.weight", (d,), False),
            q=load(f"{blk}.attn_q.weight", (keys, d), True),
            k=load(f"{blk}.attn_k.weight", (keys, d), True),
            v=load(f"{blk}.attn_v.weight", (values, d), True),
            gate=load(f"{blk}.attn_gate.weight", (values, d), True),
            a=load(f"{blk}.ssm_alpha.weight", (config.value_heads, d), True),
            b=load(f"{blk}.ssm_beta.weight", (config.value_heads, d), True),
            conv_q=load(f"{blk}.ssm_conv1d_q.weight", (keys, width), False),
            conv_k=load(f"{blk}.ssm_conv1d_k.weight", (keys, width), False),
            conv_v=load(f"{blk}.ssm_conv1d_v.weight", (values, width), False),
            ssm_a=load(f"{blk}.ssm_a", (config.value_heads,), False),
            dt_bias=load(f"{blk}.ssm_dt.bias", (config.value_heads,), False),
            norm=load(f"{blk}.ssm_norm.weight", (config.value_dim,), False),
            out=load(f"{blk}.ssm_out.weight", (d, values), True),
            ffn_norm=load(f"{blk}.ffn_norm.weight", (d,), False),
            mlp=mlp(blk),
        )

    def attention(blk: str) -> AttentionLayer:
        return AttentionLayer(
            q=load(f"{blk}.attn_q.weight", (d, d), True),
            k=load(f"{blk}.attn_k.weight", (kv, d), True),
            v=load(f"{blk}.attn_v.weight", (kv, d), True),
            q_norm=load(f"{blk}.attn_q_norm.weight", (d,), False),
            k_norm=load(f"{blk}.attn_k_norm.weight", (kv,), False),
            out=load(f"{blk}.attn_output.weight", (d, d), True),
            attn_norm=load(f"{blk}.post_attention_norm.weight", (d,), False),
            ffn_norm=load(f"{blk}.post_ffw_norm.weight", (d,), False),
            mlp=mlp(blk),
        )

    embed = load("token_embd.weight", (config.vocab_size, d), True)
    layers = tuple((gdn if kind == LINEAR else attention)(f"blk.{i}") for i, kind in enumerate(config.layer_types))
    norm = load("output_norm.weight", (d,), False)
    head = embed if config.tie_word_embeddings else load("output.weight", (config.vocab_size, d), True)
    return Weights(config, embed, layers, norm, head)


def expected_tensors(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    """GGUF name -> shape (slowest axis first) of every tensor that a model of this configuration has."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, shape: tuple[int, ...], matrix: bool) -> None:
        shapes[name] = shape

    bind(config, note)
    return shapes


def read_each_step(weights: Weights) -> Iterator[Any]:
    """The handles of everything that one decoding step reads whole: all but an input table that is not the head too."""
    def inside(part: Any) -> Iterator[Any]:
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, MLP):
                yield from inside(value)
            else:
                yield value

    for layer in weights.layers:
        yield from inside(layer)
    yield weights.norm
    yield weights.head
