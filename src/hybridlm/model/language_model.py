"""`HybridLM`: token ids to logits. Embedding, blocks, a last norm, and the head.

    model = HybridLM(HybridConfig.preset("60m"))            # random weights of `init_weights(0)`
    model = HybridLM.from_pretrained("folder")              # safetensors of either Hugging Face generation
    logits = model(input_ids)                               # [B, T] -> [B, T, vocab]
    cache = model.new_cache(); model(prompt, cache=cache); model(next_token, cache=cache)
    model(row, cu_seqlens=starts)                           # or documents=[B, T]: packed, nothing leaks between them

Training fast on a GPU: float32 weights, bfloat16 activations, each kind of block compiled once.

    torch.set_float32_matmul_precision("high")              # tf32 inside the delta rule: see hybridlm.ops.chunked
    model = HybridLM(config).cuda()
    model.compute_dtype = torch.bfloat16
    model.compile_blocks()
    x = model.hidden(input_ids, documents=documents)        # [B, T, D]
    ... the loss from x and model.head_weight, a slice of rows at a time: all logits at once would be the largest
        tensor of the step ...

`state_dict()` has exactly the released tensor names and shapes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.config import LINEAR, HybridConfig, Rope
from hybridlm.model import checkpoint
from hybridlm.model.block import AttentionBlock, DeltaNetBlock
from hybridlm.model.cache import Cache
from hybridlm.model.gated_deltanet import Convolution, GatedDeltaNet
from hybridlm.model.layers import Embedding, Linear, RMSNorm
from hybridlm.ops import AttentionMask, attention_mask, documents_of, positions_of, rope_tables

__all__ = ["HybridLM"]


class Backbone(nn.Module):
    """What the released names put under `model.`."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DeltaNetBlock(config) if kind == LINEAR else AttentionBlock(config, config.window_of(i))
            for i, kind in enumerate(config.layer_types))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class HybridLM(nn.Module):
    """A hybrid (or transformer-only) language model of any `HybridConfig`.

    `compute_dtype` is the dtype of activations; None means that of the weights.
    """

    def __init__(self, config: HybridConfig, *, init: bool = True) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.model = Backbone(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        self._ropes = {rope: f"_inv_freq_{i}" for i, rope in enumerate(
            dict.fromkeys(r for r in map(self._rope_of, range(config.num_hidden_layers)) if r is not None))}
        self._place_frequencies()
        if init and not self.head_weight.is_meta:
            self.init_weights(0)

    def _rope_of(self, layer: int) -> Rope | None:
        return None if self.config.layer_types[layer] == LINEAR else self.config.rope_of(layer)

    def _place_frequencies(self) -> None:
        """The float32 frequencies as int32 bits, so that casting the model to another dtype does not round them."""
        for rope, name in self._ropes.items():
            bits = torch.from_numpy(rope.inv_freq(self.config.head_dim)).view(torch.int32)
            self.register_buffer(name, bits.to(self.head_weight.device), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """[vocab, D], the output head: logits = hidden @ head_weight.T. The input table, where they are tied."""
        head: Tensor = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return head

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None,
                documents: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocab] of `input_ids` [B, T]; see `hidden` for the rest."""
        x = self.hidden(input_ids, cache, cu_seqlens, documents)
        return F.linear(x, self.head_weight.to(x.dtype))

    def hidden(self, input_ids: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None,
               documents: Tensor | None = None) -> Tensor:
        """The last norm's output [B, T, D].

        With a `cache` (of `new_cache`) the tokens continue those that it has seen, and it is updated. `cu_seqlens`
        [N + 1] divides one row into documents; `documents` [B, T] numbers them for any batch and compiles: equal
        numbers over a contiguous stretch are one document. Positions then count from each document's start.
        """
        if cu_seqlens is not None:
            if input_ids.shape[0] != 1 or documents is not None:
                raise ValueError("cu_seqlens divides a batch of one row, and replaces documents")
            documents = documents_of(cu_seqlens, input_ids.shape[1])
        if documents is not None and cache is not None:
            raise ValueError("packed documents and a cache do not go together: prefill one document at a time")
        x = self.model.embed_tokens(input_ids)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        tables = self._rope_tables(input_ids, 0 if cache is None else cache.position, documents, x.dtype)
        masks = self._masks(input_ids, documents) if cache is None else []
        for i, block in enumerate(self.model.layers):
            if cache is None:
                x = block(x, None, documents, tables[i], masks[i])
            else:  # lengths change from call to call: never the compiled form
                x = block.forward(x, cache.layers[i], None, tables[i])
        if cache is not None:
            cache.position += input_ids.shape[1]
        y: Tensor = self.model.norm(x)
        return y

    def _rope_tables(self, input_ids: Tensor, start: int, documents: Tensor | None,
                     dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
        """cos and sin for each layer, made once per kind; float32, in a float64 model float64."""
        if not self._ropes:
            return [None] * self.config.num_hidden_layers
        if documents is not None:
            positions = positions_of(documents)
        else:
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        made = {}
        for rope, name in self._ropes.items():
            frequencies = getattr(self, name).view(torch.float32)
            made[rope] = rope_tables(frequencies.double() if dtype == torch.float64 else frequencies, positions,
                                     rope.scale)
        ropes = (self._rope_of(i) for i in range(self.config.num_hidden_layers))
        return [None if rope is None else made[rope] for rope in ropes]

    def _masks(self, input_ids: Tensor, documents: Tensor | None) -> list[AttentionMask | None]:
        """The attention mask of each layer, made once per window."""
        c = self.config
        windows = {c.window_of(i) for i, kind in enumerate(c.layer_types) if kind != LINEAR}
        made = {window: attention_mask(input_ids.shape[1], window=window, documents=documents, head_dim=c.head_dim,
                                       device=input_ids.device) for window in windows}
        return [None if kind == LINEAR else made[c.window_of(i)] for i, kind in enumerate(c.layer_types)]

    def new_cache(self) -> Cache:
        """An empty cache for this model."""
        return Cache(self.config)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile each block by itself, for training: one compilation per kind of block, whatever the depth.

        For fixed shapes: each new [B, T] compiles again, and the ninth is an error of PyTorch's, so validate in
        batches of the training shape. Calls with a cache run uncompiled.
        """
        for block in self.model.layers:
            block.compile(**{"fullgraph": True, "dynamic": False, **options})

    # -- weights -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None) -> HybridLM:
        """Load a Hugging Face folder (olmo_hybrid of either naming, or olmo3). Without `dtype`, as stored."""
        config = HybridConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config, init=False)
        model.load_state_dict(dict(checkpoint.load(folder, config, dtype, device)), assign=True)
        model._place_frequencies()
        return model

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, *,
                        max_shard_bytes: int = 5 << 30) -> None:
        """Write config.json and safetensors that transformers and vLLM read, in `dtype` or as the weights are."""
        checkpoint.save(self, folder, dtype, max_shard_bytes)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Random weights, the same for a seed on every device.

        Matrices and the input table: normal of deviation `initializer_range`, cut off at three deviations. Norms: 1.
        Convolutions: uniform within 1 / sqrt(W). Gated DeltaNet: exp(A_log) uniform in (a_log_min, a_log_max), and
        dt_bias such that softplus(dt_bias) is log-uniform in [dt_min, dt_max], at least dt_init_floor.
        """
        c = self.config
        generator = torch.Generator().manual_seed(seed)

        def uniform(like: Tensor, low: float, high: float) -> Tensor:  # in (low, high]
            return high - torch.rand(like.shape, generator=generator) * (high - low)

        for module in self.modules():
            if isinstance(module, Linear | Embedding):
                std = c.initializer_range
                value = torch.empty(module.weight.shape)
                nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)
                module.weight.copy_(value)
            elif isinstance(module, Convolution):
                bound = c.linear_conv_kernel_dim**-0.5
                module.weight.copy_(uniform(module.weight, -bound, bound))
            elif isinstance(module, GatedDeltaNet):
                module.A_log.copy_(uniform(module.A_log, c.linear_a_log_min, c.linear_a_log_max).log())
                dt = uniform(module.dt_bias, math.log(c.linear_dt_min), math.log(c.linear_dt_max)).exp()
                dt = dt.clamp_min(c.linear_dt_init_floor)
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus's inverse
                module.o_norm.weight.fill_(1)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1)
        self._place_frequencies()
