"""Small random models: configurations, weights, engines in float64, GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.engine.reference_ops import ReferenceOps, array_loader

from hybridlm.config import FULL, LINEAR, SLIDING, HybridConfig, Rope, Yarn
from hybridlm.engine.engine import Engine
from hybridlm.engine.layout import Layout
from hybridlm.engine.weights import bind, expected_tensors


def random_config(rng: np.random.Generator, **fixed: Any) -> HybridConfig:
    """A small model with any combination of what configurations can say."""
    heads = int(rng.choice([1, 2, 4, 6]))
    d = heads * int(rng.choice([8, 16, 32]))
    kinds = [LINEAR, FULL, SLIDING]
    layers = tuple(kinds[i] for i in rng.choice(3, size=rng.integers(1, 5), p=[0.5, 0.3, 0.2]))
    ropes = [None, Rope(10_000.0), Rope(500_000.0, Yarn(float(rng.uniform(1, 16)), 64))]
    key_heads = int(rng.choice([1, 2, 3]))
    options: dict[str, Any] = {
        "vocab_size": int(rng.integers(40, 300)), "hidden_size": d, "intermediate_size": int(rng.integers(16, 120)),
        "layer_types": layers, "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice([h for h in (1, 2, 3, 4, 6) if heads % h == 0])),
        "linear_num_key_heads": key_heads, "linear_num_value_heads": key_heads * int(rng.choice([1, 2, 3])),
        "linear_key_head_dim": int(rng.choice([4, 12, 16, 24])), "linear_value_head_dim": int(rng.choice([8, 24, 32])),
        "linear_conv_kernel_dim": int(rng.choice([2, 4])), "linear_allow_neg_eigval": bool(rng.integers(2)),
        "rope": ropes[rng.integers(3)] if FULL in layers else None,
        "sliding_rope": ropes[rng.integers(3)] if SLIDING in layers else None,
        "sliding_window": int(rng.choice([1, 5, 64, 100])) if SLIDING in layers else None,
        "tie_word_embeddings": bool(rng.integers(2)),
        "max_position_embeddings": 2048,
    }
    return HybridConfig(**{**options, **fixed})


def small_config(**changes: Any) -> HybridConfig:
    """One fixed hybrid with both kinds of layer."""
    base = HybridConfig(vocab_size=96, hidden_size=32, intermediate_size=48, layer_types=(LINEAR, FULL, LINEAR),
                        num_attention_heads=2, linear_key_head_dim=12, linear_value_head_dim=24, rope=Rope(10_000.0),
                        max_position_embeddings=4096)
    return base.with_(**changes)


def random_tensors(config: HybridConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Float32 weights by GGUF name, scaled so that activations stay of order one and logits differ clearly."""
    tensors = {}
    for name, shape in expected_tensors(config).items():
        if name.endswith("ssm_a"):
            value = -np.exp(rng.uniform(-3, 1.5, shape))
        elif "norm" in name:
            value = 1 + 0.2 * rng.standard_normal(shape)
        elif "conv1d" in name:
            value = 0.5 * rng.standard_normal(shape)
        else:
            value = rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 1)
        tensors[name] = value.astype(np.float32)
    return tensors


def reference_engine(config: HybridConfig | None = None, seed: int = 0, *, kv_type: str = "f32",
                     tensors: dict[str, np.ndarray] | None = None, **options: Any) -> Engine:
    """An engine in float64, without native code or a file."""
    config = config or small_config()
    tensors = tensors or random_tensors(config, np.random.default_rng(seed))
    layout = Layout.of(config, f"seed {seed}", kv_type)
    return Engine(bind(config, array_loader(tensors)), ReferenceOps(config, layout), layout, **options)


def write_gguf(path: Path, config: HybridConfig, tensors: dict[str, np.ndarray], *, tokenizer_json: str | None = None,
               chat_template: str | None = None, leave_out: str | None = None) -> Path:
    """A float32 GGUF, written by gguf-py, so that reader and engine meet a file that is not of their own making."""
    import json

    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "olmo-hybrid")
    writer.add_string("hybridlm.config", json.dumps(config.to_dict()))
    if tokenizer_json is not None:
        writer.add_string("tokenizer.huggingface.json", tokenizer_json)
    if chat_template is not None:
        writer.add_string("tokenizer.chat_template", chat_template)
    for name, value in tensors.items():
        if name != leave_out:
            writer.add_tensor(name, value)
    finish_gguf(writer)
    return path


def finish_gguf(writer: Any) -> None:
    """Write out what a gguf-py writer has been given."""
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
