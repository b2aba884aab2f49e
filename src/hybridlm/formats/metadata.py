"""What a GGUF file says about its model: hybridlm's own keys, and llama.cpp's beside them.

`hybridlm.config` is the whole configuration and what this package reads back. The other keys say the same in
llama.cpp's words, so that support there could read the file.
"""

from __future__ import annotations

import json

from hybridlm.config import FULL, LINEAR, SLIDING, HybridConfig, Rope
from hybridlm.formats.blocks import GGMLType
from hybridlm.formats.gguf_reader import ARCHITECTURE
from hybridlm.formats.gguf_writer import Entry, boolean_list, f32, i32_list, text, u32

__all__ = ["file_type", "model_entries"]

# llama.cpp's number for "mostly of this type".
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
               "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XXS": 23, "IQ1_S": 24,
               "IQ4_NL": 25, "IQ3_S": 26, "IQ2_S": 28, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32,
               "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38}


def file_type(type: GGMLType, asked: str) -> dict[str, Entry]:
    """The entries that name the type of most weights, and what was asked for."""
    entries = {"general.quantization_version": u32(2), "hybridlm.type": text(asked.lower())}
    if type.name in _FILE_TYPES:
        entries["general.file_type"] = u32(_FILE_TYPES[type.name])
    return entries


def model_entries(config: HybridConfig, name: str) -> dict[str, Entry]:
    """Everything but tokenizer and type."""
    entries = {"general.type": text("model"), "general.name": text(name),
               "hybridlm.config": text(json.dumps(config.to_dict()))}
    arch = {
        "vocab_size": u32(config.vocab_size), "context_length": u32(config.max_position_embeddings),
        "embedding_length": u32(config.hidden_size), "block_count": u32(config.num_hidden_layers),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": i32_list([0 if kind == LINEAR else config.kv_heads for kind in config.layer_types]),
        "attention.key_length": u32(config.head_dim), "attention.value_length": u32(config.head_dim),
        "attention.recurrent_layers": boolean_list([kind == LINEAR for kind in config.layer_types]),
    }
    if LINEAR in config.layer_types:
        arch |= {
            "ssm.conv_kernel": u32(config.linear_conv_kernel_dim), "ssm.state_size": u32(config.key_dim),
            "ssm.group_count": u32(config.key_heads), "ssm.time_step_rank": u32(config.value_heads),
            "ssm.inner_size": u32(config.value_heads * config.value_dim),
        }
    if interval := _interval(config.layer_types):
        arch["full_attention_interval"] = u32(interval)
    if SLIDING in config.layer_types:
        arch["attention.sliding_window"] = u32(config.sliding_window or 0)
        arch["attention.sliding_window_pattern"] = boolean_list([kind == SLIDING for kind in config.layer_types])
        arch |= _rope(config.sliding_rope, config.head_dim, "_swa")
    arch |= _rope(config.rope, config.head_dim)
    return entries | {f"{ARCHITECTURE}.{key}": entry for key, entry in arch.items()}


def _interval(kinds: tuple[str, ...]) -> int | None:
    """n, when every n-th layer is full attention and no other."""
    n = kinds.index(FULL) + 1 if FULL in kinds else 0
    regular = n > 1 and all((kind == FULL) == ((i + 1) % n == 0) for i, kind in enumerate(kinds))
    return n if regular else None


def _rope(rope: Rope | None, head_dim: int, suffix: str = "") -> dict[str, Entry]:
    """Rotary embedding. None is written out as zero rotated dimensions, because an absent key means theta 10,000; the
    theta of 0 turns a reader that looks no further into one that fails rather than one that is wrong."""
    if rope is None:
        keys = {f"rope.dimension_count{suffix}": u32(0), f"rope.freq_base{suffix}": f32(0.0)}
        return keys if suffix else {**keys, "rope.scaling.type": text("none")}
    keys = {f"rope.dimension_count{suffix}": u32(head_dim), f"rope.freq_base{suffix}": f32(rope.theta)}
    if suffix:
        return keys
    if rope.yarn is None:
        return {**keys, "rope.scaling.type": text("none")}
    y = rope.yarn
    return {**keys, "rope.scaling.type": text("yarn"), "rope.scaling.factor": f32(y.factor),
            "rope.scaling.original_context_length": u32(y.original_max_position_embeddings),
            "rope.scaling.attn_factor": f32(y.scale), "rope.scaling.yarn_beta_fast": f32(y.beta_fast),
            "rope.scaling.yarn_beta_slow": f32(y.beta_slow)}
