"""A GGUF file with random weights that llama.cpp can run, of the 7B's size and bits: for speed only, its text is noise.

llama.cpp does not know Olmo Hybrid, so the nearest architecture that it does know stands in: qwen35, three Gated
DeltaNet layers to one of attention, width 3840, 32 layers, vocabulary 100,352. Its kernels need square heads: 23
key and 46 value heads of 128 come closest to 30 of 96 and 192. Types follow llama.cpp's own Q4_K_M habit.

    python benchmarks/peer_model.py peer.gguf
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import gguf
import numpy as np

D, FF, LAYERS, VOCAB = 3840, 11_008, 32, 100_352
HEADS, HEAD = 30, 128
KEY_HEADS, VALUE_HEADS, STATE = 23, 46, 128

F32, Q4_K, Q5_K, Q6_K = (gguf.GGMLQuantizationType[n] for n in ("F32", "Q4_K", "Q5_K", "Q6_K"))
# Offsets of the float16 scales within a block; the rest of a block may be any bits.
SCALES = {Q4_K: (0, 2), Q5_K: (0, 2), Q6_K: (208,)}


def tensors() -> Iterator[tuple[str, tuple[int, ...], gguf.GGMLQuantizationType]]:
    """Name, shape (slowest axis first), type."""
    yield "token_embd.weight", (VOCAB, D), Q4_K
    yield "output_norm.weight", (D,), F32
    yield "output.weight", (VOCAB, D), Q6_K
    keys, values = KEY_HEADS * STATE, VALUE_HEADS * STATE
    for i in range(LAYERS):
        more = i < LAYERS // 8 or i >= 7 * LAYERS // 8 or (i - LAYERS // 8) % 3 == 2  # the layers Q4_K_M spends on
        yield f"blk.{i}.attn_norm.weight", (D,), F32
        yield f"blk.{i}.post_attention_norm.weight", (D,), F32
        if i % 4 == 3:
            yield f"blk.{i}.attn_q.weight", (2 * HEADS * HEAD, D), Q4_K  # queries and their gate
            yield f"blk.{i}.attn_k.weight", (HEADS * HEAD, D), Q4_K
            yield f"blk.{i}.attn_v.weight", (HEADS * HEAD, D), Q6_K if more else Q4_K
            yield f"blk.{i}.attn_output.weight", (D, HEADS * HEAD), Q4_K
            yield f"blk.{i}.attn_q_norm.weight", (HEAD,), F32
            yield f"blk.{i}.attn_k_norm.weight", (HEAD,), F32
        else:
            yield f"blk.{i}.attn_qkv.weight", (2 * keys + values, D), Q5_K
            yield f"blk.{i}.attn_gate.weight", (values, D), Q4_K
            yield f"blk.{i}.ssm_conv1d.weight", (2 * keys + values, 4), F32
            yield f"blk.{i}.ssm_dt.bias", (VALUE_HEADS,), F32
            yield f"blk.{i}.ssm_a", (VALUE_HEADS,), F32
            yield f"blk.{i}.ssm_beta.weight", (VALUE_HEADS, D), Q4_K
            yield f"blk.{i}.ssm_alpha.weight", (VALUE_HEADS, D), Q4_K
            yield f"blk.{i}.ssm_norm.weight", (STATE,), F32
            yield f"blk.{i}.ssm_out.weight", (D, values), Q4_K
        yield f"blk.{i}.ffn_gate.weight", (FF, D), Q4_K
        yield f"blk.{i}.ffn_up.weight", (FF, D), Q4_K
        yield f"blk.{i}.ffn_down.weight", (D, FF), Q6_K if more else Q4_K


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Values of a plausible size: norms 1, decays about -1, matrices with small scales."""
    if kind == F32:
        return (rng.standard_normal(shape) * 0.1 + (1 if len(shape) == 1 else 0)).astype(np.float32)
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // elements, nbytes), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, :, at:at + 2] = np.full(1, 1e-4, np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    out = parser.parse_args().out
    w = gguf.GGUFWriter(out, "qwen35")
    w.add_context_length(65_536)
    w.add_embedding_length(D)
    w.add_feed_forward_length(FF)
    w.add_block_count(LAYERS)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS)
    w.add_key_length(HEAD)
    w.add_value_length(HEAD)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(500_000.0)
    w.add_rope_dimension_count(HEAD // 2)
    w.add_rope_dimension_sections([11, 11, 10, 0])
    w.add_ssm_conv_kernel(4)
    w.add_ssm_inner_size(VALUE_HEADS * STATE)
    w.add_ssm_state_size(STATE)
    w.add_ssm_time_step_rank(VALUE_HEADS)
    w.add_ssm_group_count(KEY_HEADS)
    w.add_uint32("qwen35.full_attention_interval", 4)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("none")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    listed = list(tensors())
    for name, shape, kind in listed:
        elements, nbytes = (1, 4) if kind == F32 else gguf.GGML_QUANT_SIZES[kind]
        raw = shape if kind == F32 else (shape[0], shape[1] // elements * nbytes)
        w.add_tensor_info(name, raw, np.dtype(np.float32 if kind == F32 else np.uint8),
                          int(np.prod(raw)) * (4 if kind == F32 else 1), raw_dtype=None if kind == F32 else kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, shape, kind in listed:
        w.write_tensor_data(random_tensor(rng, shape, kind))
    w.close()


if __name__ == "__main__":
    main()
