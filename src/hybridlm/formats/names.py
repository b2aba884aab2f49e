"""The one map between the names a tensor has: canonical, both Hugging Face generations, and GGUF.

Canonical names are those of the released Olmo Hybrid checkpoints, which keep three convolutions apart. Other files that
hold the same model differ in three ways, and `canonical` and `conv_parts` undo all of them:

    attention_layer_norm, feedforward_layer_norm    the norms' former names. transformers' `save_pretrained` writes them
                                                    by default, the second one in attention layers too
    linear_attn.conv1d.weight                       q, k and v convolutions stacked along their channels
    {q,k,v}_conv1d.weight cut at the wrong places   transformers' default `save_pretrained` cuts that stack into three
                                                    equal parts, wherever q, k and v really end

GGUF names follow llama.cpp: the split convolutions of Kimi-Linear, alpha, beta and gate of Qwen3.5, the post-norms and
full-width QK norms of OLMo 2. Pure attention models (Olmo 3, a hybrid's twin) use the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hybridlm.config import LINEAR, HybridConfig
from hybridlm.errors import FormatError

__all__ = ["Spec", "canonical", "check", "conv_parts", "is_ignored", "specs"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor that a model of some configuration has."""

    name: str  # canonical, a Hugging Face name
    gguf: str
    hf_shape: tuple[int, ...]
    shape: tuple[int, ...]  # in GGUF, slowest axis first: convolutions lose their middle axis
    matrix: bool  # may be quantised


def specs(config: HybridConfig) -> Iterator[Spec]:
    """Every tensor of a model, in the order in which files hold them."""
    d, ff = config.hidden_size, config.intermediate_size
    keys, values, heads = config.key_heads * config.key_dim, config.value_heads * config.value_dim, config.value_heads
    kv, taps = config.kv_heads * config.head_dim, config.linear_conv_kernel_dim

    def matrix(name: str, gguf: str, rows: int, cols: int) -> Spec:
        return Spec(f"{name}.weight", f"{gguf}.weight", (rows, cols), (rows, cols), True)

    def vector(name: str, gguf: str, size: int) -> Spec:
        return Spec(name, gguf, (size,), (size,), False)

    def conv(name: str, gguf: str, channels: int) -> Spec:
        return Spec(f"{name}.weight", f"{gguf}.weight", (channels, 1, taps), (channels, taps), False)

    yield matrix("model.embed_tokens", "token_embd", config.vocab_size, d)
    for i, kind in enumerate(config.layer_types):
        hf, blk = f"model.layers.{i}", f"blk.{i}"
        if kind == LINEAR:
            mixer = f"{hf}.linear_attn"
            yield vector(f"{hf}.input_layernorm.weight", f"{blk}.attn_norm.weight", d)
            yield matrix(f"{mixer}.q_proj", f"{blk}.attn_q", keys, d)
            yield matrix(f"{mixer}.k_proj", f"{blk}.attn_k", keys, d)
            yield matrix(f"{mixer}.v_proj", f"{blk}.attn_v", values, d)
            yield matrix(f"{mixer}.g_proj", f"{blk}.attn_gate", values, d)
            yield matrix(f"{mixer}.a_proj", f"{blk}.ssm_alpha", heads, d)
            yield matrix(f"{mixer}.b_proj", f"{blk}.ssm_beta", heads, d)
            yield conv(f"{mixer}.q_conv1d", f"{blk}.ssm_conv1d_q", keys)
            yield conv(f"{mixer}.k_conv1d", f"{blk}.ssm_conv1d_k", keys)
            yield conv(f"{mixer}.v_conv1d", f"{blk}.ssm_conv1d_v", values)
            yield vector(f"{mixer}.A_log", f"{blk}.ssm_a", heads)
            yield vector(f"{mixer}.dt_bias", f"{blk}.ssm_dt.bias", heads)
            yield vector(f"{mixer}.o_norm.weight", f"{blk}.ssm_norm.weight", config.value_dim)
            yield matrix(f"{mixer}.o_proj", f"{blk}.ssm_out", d, values)
            yield vector(f"{hf}.post_attention_layernorm.weight", f"{blk}.ffn_norm.weight", d)
        else:
            mixer = f"{hf}.self_attn"
            yield matrix(f"{mixer}.q_proj", f"{blk}.attn_q", d, d)
            yield matrix(f"{mixer}.k_proj", f"{blk}.attn_k", kv, d)
            yield matrix(f"{mixer}.v_proj", f"{blk}.attn_v", kv, d)
            yield vector(f"{mixer}.q_norm.weight", f"{blk}.attn_q_norm.weight", d)
            yield vector(f"{mixer}.k_norm.weight", f"{blk}.attn_k_norm.weight", kv)
            yield matrix(f"{mixer}.o_proj", f"{blk}.attn_output", d, d)
            yield vector(f"{hf}.post_attention_layernorm.weight", f"{blk}.post_attention_norm.weight", d)
            yield vector(f"{hf}.post_feedforward_layernorm.weight", f"{blk}.post_ffw_norm.weight", d)
        yield matrix(f"{hf}.mlp.gate_proj", f"{blk}.ffn_gate", ff, d)
        yield matrix(f"{hf}.mlp.up_proj", f"{blk}.ffn_up", ff, d)
        yield matrix(f"{hf}.mlp.down_proj", f"{blk}.ffn_down", d, ff)
    yield vector("model.norm.weight", "output_norm.weight", d)
    if not config.tie_word_embeddings:
        yield matrix("lm_head", "output", config.vocab_size, d)


_FORMER = (
    (re.compile(r"(layers\.\d+)\.attention_layer_norm\."), r"\1.input_layernorm."),
    (re.compile(r"(layers\.\d+)\.feedforward_layer_norm\."), r"\1.post_attention_layernorm."),
)


def canonical(name: str) -> str:
    """A Hugging Face name of either generation as the canonical one. Convolutions: see `conv_parts`."""
    for pattern, replacement in _FORMER:
        name = pattern.sub(replacement, name)
    return name


def is_ignored(name: str) -> bool:
    """Buffers that some versions of transformers save and nobody reads."""
    return name.endswith("rotary_emb.inv_freq")


def conv_parts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[str, int, int], ...]]:
    """Where each of the three convolutions lies when the file fuses them or cuts them at other places.

    From canonical name -> shape of a file: canonical convolution name -> ((name in the file, first row, last row + 1),
    ...), only for layers whose tensors cannot be taken as they are. q, k and v end where their projections' rows do.
    """
    parts: dict[str, tuple[tuple[str, int, int], ...]] = {}
    mixers = {m[1] for name in shapes if (m := re.fullmatch(r"(.*\.linear_attn)\.[qkv]?_?conv1d\.weight", name))}
    for mixer in sorted(mixers):
        fused = f"{mixer}.conv1d.weight"
        split = [f"{mixer}.{x}_conv1d.weight" for x in "qkv"]
        sources = [fused] if fused in shapes else split
        if missing := [n for n in sources if n not in shapes]:
            raise FormatError(f"{missing[0]}: missing; the checkpoint is incomplete")
        if fused in shapes and (both := [n for n in split if n in shapes]):
            raise FormatError(f"{both[0]}: the checkpoint holds this convolution twice, alone and fused")
        projections = [shapes.get(f"{mixer}.{x}_proj.weight") for x in "qkv"]
        if not all(projections) or not all(shapes[n] for n in sources):
            raise FormatError(f"{mixer}: a projection is missing beside its convolution; the checkpoint is incomplete")
        rows = [p[0] for p in projections if p]
        held = [shapes[n][0] for n in sources]
        if sources == split and held == rows:
            continue
        if sum(held) != sum(rows):
            raise FormatError(f"{sources[0]}: {sum(held)} channels where the projections have {sum(rows)}")
        start = 0
        for name, size in zip(split, rows, strict=True):
            parts[name] = tuple(_pieces(sources, held, start, start + size))
            start += size
    return parts


def _pieces(sources: list[str], sizes: list[int], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Rows start..stop of the sources laid end to end."""
    base = 0
    for name, size in zip(sources, sizes, strict=True):
        first, last = max(start, base), min(stop, base + size)
        if first < last:
            yield name, first - base, last - base
        base += size


def check(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse a file whose tensors are not exactly those of the configuration, naming the first difference."""
    for name, shape in expected.items():
        if name not in found:
            raise FormatError(f"{where}: tensor {name} is missing; the file is incomplete")
        if found[name] != shape:
            raise FormatError(f"{where}: tensor {name} is {list(found[name])}; the model needs {list(shape)}")
    for name in found:
        if name not in expected:
            raise FormatError(f"{where}: tensor {name} is no part of the configured model (a different architecture?)")
