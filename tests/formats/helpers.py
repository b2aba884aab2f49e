"""Random small models for the tests of this room: configurations, tensors, folders in every generation of names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from hybridlm.config import FULL, LINEAR, SLIDING, HybridConfig, Rope, Yarn
from hybridlm.formats.names import specs

THETAS = st.sampled_from([10_000.0, 500_000.0, 1234.5])
YARNS = st.builds(
    Yarn, factor=st.sampled_from([1.0, 4.0, 8.0]), original_max_position_embeddings=st.sampled_from([64, 8192]),
    beta_fast=st.sampled_from([32.0, 16.0]), beta_slow=st.sampled_from([1.0, 2.0]),
    attention_factor=st.sampled_from([None, 1.25]), truncate=st.booleans(),
)
ROPES = st.none() | st.builds(Rope, THETAS) | st.builds(Rope, THETAS, YARNS)


@st.composite
def configs(draw, *, hybrid=True, rows=st.sampled_from([8, 12, 32, 64])) -> HybridConfig:
    """A small model, of a shape that transformers can build too; `hybrid=False` gives an Olmo 3."""
    heads = draw(st.sampled_from([2, 4, 6]))
    key_heads = draw(st.sampled_from([1, 2, 3]))
    depth = draw(st.integers(2, 4))
    if hybrid:
        layers = draw(st.lists(st.sampled_from([LINEAR, FULL]), min_size=depth, max_size=depth)
                      .filter(lambda kinds: len(set(kinds)) == 2))
    else:
        layers = draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=depth, max_size=depth))
    return HybridConfig(
        vocab_size=draw(st.integers(40, 90)), hidden_size=heads * draw(st.sampled_from([8, 16, 32])),
        intermediate_size=draw(st.sampled_from([24, 33, 64])), layer_types=tuple(layers), num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([1, 2, heads])),
        linear_num_key_heads=key_heads, linear_num_value_heads=key_heads * draw(st.sampled_from([1, 2])),
        linear_key_head_dim=draw(rows), linear_value_head_dim=draw(rows),
        linear_conv_kernel_dim=draw(st.integers(2, 4)),
        linear_allow_neg_eigval=draw(st.booleans()), rope=draw(ROPES) if hybrid else draw(ROPES.filter(bool)),
        sliding_rope=draw(st.builds(Rope, THETAS)) if SLIDING in layers else None,
        sliding_window=draw(st.integers(1, 8)) if SLIDING in layers else None,
        tie_word_embeddings=draw(st.booleans()), rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        eos_token_id=draw(st.sampled_from([None, 3, (3, 5)])), pad_token_id=draw(st.sampled_from([None, 1])),
        max_position_embeddings=draw(st.sampled_from([64, 65_536])),
    )


def weights(config: HybridConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical name -> float32 values, in the shapes of a Hugging Face file."""
    rng = np.random.default_rng(seed)
    tensors = {s.name: rng.standard_normal(s.hf_shape).astype(np.float32) for s in specs(config)}
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] = 1 + tensors[name] / 8
    return tensors


def generations(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The same model as the released files name it, fused, and with former names and convolutions cut in thirds."""
    mixers = {n.removesuffix(".A_log") for n in tensors if n.endswith(".A_log")}
    fused, former = dict(tensors), dict(tensors)
    for mixer in mixers:
        names = [f"{mixer}.{x}_conv1d.weight" for x in "qkv"]
        whole = np.concatenate([tensors[n] for n in names])
        for n in names:
            del fused[n]
        fused[f"{mixer}.conv1d.weight"] = whole
        for n, part in zip(names, np.array_split(whole, 3), strict=True):
            former[n] = part
        layer = mixer.removesuffix(".linear_attn")
        former[f"{layer}.attention_layer_norm.weight"] = former.pop(f"{layer}.input_layernorm.weight")
    former = {n.replace("post_attention_layernorm", "feedforward_layer_norm"): t for n, t in former.items()}
    return {"released": tensors, "fused": fused, "former": former}


def write_folder(folder: Path, tensors: dict[str, np.ndarray], dtype: str = "F32", **options) -> None:
    """A safetensors folder through the package's own writer, names as they are given."""
    from hybridlm.formats.checkpoint import save_checkpoint

    save_checkpoint(folder, [(n, dtype, t.shape, encode(t, dtype)) for n, t in tensors.items()], **options)


def encode(x: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":  # truncation is enough here
        return (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    return x.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
