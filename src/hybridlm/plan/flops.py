"""FLOP a token, counted: what the mathematics needs, nothing recomputed, each part by itself.

A product of an [m, k] and a [k, n] matrix is 2mkn FLOP. Backward needs twice what forward does, so training is three
times forward. Not counted: norms, activations, softmax, rotations, the optimiser (bytes bound them, not FLOP).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridlm.config import LINEAR, HybridConfig

__all__ = ["CHUNK", "Flops", "flops_per_token"]

CHUNK = 64  # tokens that the chunked delta rule takes at a time


@dataclass(frozen=True)
class Flops:
    """Forward FLOP a token, averaged over the positions of a sequence."""

    mixers: float  # projections of Gated DeltaNet and attention
    mlp: float
    head: float
    attention: float  # scores and their sum of values, the causal half (of the window, where there is one)
    recurrence: float  # the delta rule as a recurrence: 8 FLOP for each entry of a K x V state
    convolution: float
    chunked: float  # what the chunked form executes in the recurrence's place; not part of the sum

    @property
    def forward(self) -> float:
        return self.mixers + self.mlp + self.head + self.attention + self.recurrence + self.convolution

    @property
    def training(self) -> float:
        """Forward and backward; the numerator of MFU."""
        return 3 * self.forward

    def executed(self, recompute: float = 0.0) -> float:
        """What the GPU really does: chunks for the recurrence, and `recompute` (0..1) of the layers twice forward."""
        once = self.forward - self.recurrence + self.chunked
        return 3 * once + recompute * (once - self.head)


def flops_per_token(config: HybridConfig, sequence: int) -> Flops:
    """Count a model at a training length of `sequence` tokens.

    The delta rule: S <- a S is 1 FLOP an entry, k^T S 2, the outer product and its sum 2, q^T S 2, and one for the
    gates' products: 8 K V a head, as others count it. Chunked (C tokens at a time): K K^T, Q K^T, the triangular
    system on K and V, its inverse, the scores on the writes, and three products with the state.
    """
    d, ff = config.hidden_size, config.intermediate_size
    keys, values = config.key_heads * config.key_dim, config.value_heads * config.value_dim
    kv = config.kv_heads * config.head_dim
    mixers = attention = recurrence = convolution = chunked = 0.0
    for i, kind in enumerate(config.layer_types):
        if kind == LINEAR:
            mixers += 2 * d * (2 * keys + 3 * values + 2 * config.value_heads)
            recurrence += 8 * config.value_heads * config.key_dim * config.value_dim
            convolution += 2 * config.linear_conv_kernel_dim * config.conv_channels
            K, V = config.key_dim, config.value_dim
            chunked += config.value_heads * (CHUNK * (6 * K + 4 * V) + 6 * K * V + CHUNK**2)
        else:
            mixers += 2 * d * (2 * d + 2 * kv)
            window = min(config.window_of(i) or sequence, sequence)
            seen = window - window * (window - 1) / (2 * sequence)  # keys of a query on average, itself among them
            attention += 4 * d * seen
    return Flops(mixers, 6.0 * d * ff * config.num_hidden_layers, 2.0 * config.vocab_size * d, attention, recurrence,
                 convolution, chunked)
