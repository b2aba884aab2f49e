"""`7b`: Olmo Hybrid 7B as AI2 trained it: pretraining, midtraining twice and souped, long context.

    hybridlm train 7b data=TEXT tokenizer=TOKENIZER out=DIR --nproc 8 --nnodes 64
    hybridlm train olmo-hybrid pretrain.data=A midtrain.data=B long.data=C tokenizer=TOKENIZER out=DIR

Figures of OLMo-core's official scripts: 4 Mi tokens a step; learning rate 3e-4 by cosine to a tenth, 2,000 steps of
warm-up; all but the token table decayed; batches skipped beyond 6 deviations over 128; z-loss 1e-5; sequences that only
repeat themselves left out; no masks between documents. Midtraining and long context fall linearly from 2.0712e-4 to 0.
"""

from __future__ import annotations

from hybridlm.config import HybridConfig, Rope
from hybridlm.train.recipe import Recipe
from hybridlm.train.stages import Stage

__all__ = ["olmo_hybrid", "olmo_hybrid_7b"]

LATER = "0.00020712352850360292"  # the learning rate that midtraining and long context begin with


def olmo_hybrid_7b() -> Recipe:
    """Pretraining: 5.93T tokens in 1,414,078 steps, with rotary embeddings, which long context then drops."""
    return Recipe(
        model=HybridConfig.preset("7b").with_(rope=Rope(500_000.0)),
        vocab=100_352,
        steps=1_414_078, batch=512, microbatch=1, sequence=8192, mask_documents=False, repetition=32,
        lr=3e-4, schedule="cosine", warmup=2000, lr_end=0.1, weight_decay=0.1, decay_all=True, z_loss=1e-5,
        skip_sigma=6, skip_window=128, seed=34521,
        dtype="bfloat16", compile=True, dp_shard=8, timeout=600,
        save_every=500, permanent_every=1000, val_every=1000, val_tokens=10_000_000,
    )


def olmo_hybrid() -> list[Stage]:
    """The three stages; settings are those that differ from `7b`."""
    later = {"steps": "23842", "schedule": "linear", "lr": LATER, "lr_end": "0"}
    return [
        Stage("pretrain", "7b", {}),
        Stage("midtrain", "7b", {**later, "warmup": "0", "moments": "true"}, seeds=(1337, 683)),
        Stage("long", "7b", {**later, "warmup": "200", "sequence": "65536", "batch": "64", "rope": "drop",
                             "packing": "whole", "mask_documents": "true", "cp": "2", "recompute": "0.5"}),
    ]
