"""A model small enough to make in a moment, as a Hugging Face folder: random weights, a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tests.text.helpers import byte_level

from hybridlm.config import FULL, LINEAR, HybridConfig
from hybridlm.formats.checkpoint import save_checkpoint
from hybridlm.formats.names import specs
from hybridlm.text import CHATML


def micro_config(**changes) -> HybridConfig:
    """Every width a multiple of 32, so that every type fits."""
    base = dict(vocab_size=416, hidden_size=64, intermediate_size=96, layer_types=(LINEAR, LINEAR, FULL),
                num_attention_heads=2, linear_key_head_dim=32, linear_value_head_dim=64, eos_token_id=0,
                max_position_embeddings=512)
    return HybridConfig(**{**base, **changes})


def write_micro(folder: Path, *, seed: int = 0, chat: str = CHATML, max_shard_bytes: int = 200_000, **changes) -> Path:
    """The folder: safetensors in several shards, config.json, a tokenizer, a chat template unless `chat` is empty."""
    config = micro_config(**changes)
    rng = np.random.default_rng(seed)

    def values(spec) -> np.ndarray:
        x = rng.standard_normal(spec.hf_shape).astype(np.float32)
        return 1 + x / 8 if spec.name.endswith("norm.weight") else x / spec.hf_shape[-1] ** 0.5

    folder.mkdir(parents=True, exist_ok=True)
    tensors = [(s.name, "F32", s.hf_shape, values(s).tobytes()) for s in specs(config)]
    save_checkpoint(folder, tensors, max_shard_bytes=max_shard_bytes)
    config.save_pretrained(folder)
    byte_level().save(folder)
    if chat:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": chat}))
    return folder
