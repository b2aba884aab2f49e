"""`hybridlm-tiny`: the 22M-parameter hybrid in `models/`, trained on one GPU in minutes.

    hybridlm train hybridlm-tiny data=CORPUS val=VAL tokenizer=TOKENIZER out=DIR seconds=480

The shape of the ladder's smallest rung with tied tables of a 16,384-token BPE. Learning rate and batch are near the
ladder's rule for its 16M weights outside the table.
"""

from __future__ import annotations

from hybridlm.config import HybridConfig
from hybridlm.train.recipe import Recipe

__all__ = ["hybridlm_tiny"]


def hybridlm_tiny() -> Recipe:
    """A wall-clock budget instead of a number of steps; float32 weights, bfloat16 arithmetic, compiled."""
    model = HybridConfig.preset("60m").with_(vocab_size=16_384, tie_word_embeddings=True)
    return Recipe(
        model=model,
        vocab=16_384,
        seconds=480, batch=64, sequence=2048,
        lr=3e-3, warmup=100, decay=0.25,
        dtype="bfloat16", compile=True,
        save_every=0, val_every=250, val_tokens=262_144,
    )
