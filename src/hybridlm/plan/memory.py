"""What a training step holds in a GPU's memory, part by part, for a parallel layout.

Weights, gradients and moments are float32 and sharded over `dp_shard` (FSDP2) and, where they are matrices of mixers
and MLPs, over `tp`. Computation is bfloat16. Activations are those that backward needs when each block is compiled: the
inputs of matrix products and kernels; what is a formula of them (norms, rotations, casts) is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from hybridlm.config import LINEAR, HybridConfig
from hybridlm.errors import ConfigError

__all__ = ["Layout", "Memory", "memory"]

LOGITS = 1 << 30  # logits that exist at a time on a GPU: ops/cross_entropy.py
RESERVE = 2.5e9  # CUDA's context, NCCL's buffers, libraries' workspaces, what the allocator cannot use
MOMENTS = {"adamw": 8, "muon": 4}  # bytes a matrix's weight


@dataclass(frozen=True)
class Layout:
    """How many GPUs share what, under the names that `hybridlm train` has for them."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) < 1:
                raise ConfigError(f"{f.name}: must be positive, not {getattr(self, f.name)}")

    @property
    def gpus(self) -> int:
        return self.dp_replicate * self.dp_shard * self.tp * self.cp

    @property
    def data(self) -> int:
        """Groups of GPUs that read different text."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        return f"dp_replicate={self.dp_replicate} dp_shard={self.dp_shard} tp={self.tp} cp={self.cp}"


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU. Training keeps no keys and values, so there is no cache."""

    weights: float
    gradients: float
    optimizer: float
    casts: float  # bfloat16 copies: those of gathered blocks, or of every matrix where nothing is sharded
    activations: float  # kept from forward to backward
    working: float  # one block forward and backward
    logits: float  # and the head's gradient in float32
    reserve: float = RESERVE

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def memory(config: HybridConfig, layout: Layout, *, sequence: int, microbatch: int = 1, recompute: float = 0.0,
           optimizer: str = "adamw") -> Memory:
    """Bytes by part. `recompute`: the share of layers that keep their input alone.

    Raises `ConfigError` for a layout that the model cannot have.
    """
    if optimizer not in MOMENTS:
        raise ConfigError(f"optimizer: {optimizer!r} is unknown; known are {', '.join(MOMENTS)}")
    d, layers = config.hidden_size, config.num_hidden_layers
    tokens = microbatch * sequence / layout.cp  # on one GPU
    matrices = sum(_matrices(config, kind) for kind in config.layer_types)
    tables = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    small = config.num_parameters() - matrices - tables
    own = matrices / layout.tp + tables + small  # a tensor-parallel rank's part of the model
    held = own / layout.dp_shard
    moments = (MOMENTS[optimizer] * matrices / layout.tp + 8 * (tables + small)) / layout.dp_shard
    kept = [_kept(config, kind, layout.tp) for kind in config.layer_types]
    block = max(matrices / layout.tp / layers, 0)
    if layout.dp_shard > 1:  # two blocks at a time (the next is fetched ahead), and the tables, gathered for the step
        casts = 2 * (2 * block) + 2 * tables
        gradient_buffer = 4 * 2 * block
    else:
        casts, gradient_buffer = 2.0 * (matrices / layout.tp + tables), 0.0
    full, checked = tokens * sum(kept), tokens * 2 * d * layers
    return Memory(
        weights=4 * held, gradients=4 * held + gradient_buffer, optimizer=moments, casts=casts,
        activations=(1 - recompute) * full + recompute * checked,
        working=tokens * max(kept) * (2 if recompute else 1),
        logits=2 * min(tokens * config.vocab_size, LOGITS) + 4 * config.vocab_size * d)


def _matrices(config: HybridConfig, kind: str) -> int:
    """Weights of a layer's matrix products, which tensor parallelism splits."""
    d, ff = config.hidden_size, config.intermediate_size
    if kind == LINEAR:
        keys, values = config.key_heads * config.key_dim, config.value_heads * config.value_dim
        return d * (2 * keys + 3 * values + 2 * config.value_heads) + 3 * d * ff
    return d * (2 * d + 2 * config.kv_heads * config.head_dim) + 3 * d * ff


def _kept(config: HybridConfig, kind: str, tp: int) -> float:
    """Bytes a token that a layer keeps for its backward, in bfloat16. Heads and the MLP's width are split over tp.

    Gated DeltaNet, pre-norm: x and the sum after the mixer; q, k, v before and after the convolution; gate, the rule's
    output, the gated norm's; a, b and the two gates made of them in float32. Attention, post-norm: x, q and k before
    their norms, q, k, v as attention takes them, its output and the log-sum of each row, the projection's output, the
    sum, the MLP's output. Both: gate, up and their product.
    """
    d, ff = config.hidden_size, config.intermediate_size
    if kind == LINEAR:
        values = config.value_heads * config.value_dim
        wide = 2 * config.conv_channels + 3 * values + 3 * ff + 6 * config.value_heads
        whole = 2 * d
    else:
        kv = config.kv_heads * config.head_dim
        wide = (d + kv) + (d + 2 * kv) + d + 2 * config.num_attention_heads + 3 * ff
        whole = 4 * d
    share = -(-max(config.value_heads, 1) // tp) / max(config.value_heads, 1)  # uneven heads: the fullest rank
    return 2 * (wide * share + whole)
