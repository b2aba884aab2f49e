"""Weights for `Engine.random`: valid blocks of any type with plausible scales, made at the speed of memory.

Encoding seven billion random numbers would take minutes. Instead about a million are encoded per type and width, and
every tensor is filled from that pool, each stretch from another row on. Speed does not depend on the values, and
activations stay finite, as they do with weights that are all different.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hybridlm import native
from hybridlm.config import HybridConfig
from hybridlm.formats.blocks import GGMLType, row_bytes
from hybridlm.formats.encode import encode
from hybridlm.formats.policy import recipe, tensor_type

__all__ = ["RandomLoader"]

_POOL = 1 << 20  # numbers
_STRETCH = 16 << 20  # bytes filled at a time


class RandomLoader:
    """A `weights.Loader` that makes what it is asked for. `nbytes` counts what it has made."""

    def __init__(self, config: HybridConfig, type: str, seed: int) -> None:
        self.config, self.type = config, recipe(type)
        self.nbytes = 0
        self._rng = np.random.default_rng(seed)
        self._pools: dict[tuple[GGMLType, int], np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], matrix: bool) -> Any:
        value = self._matrix(name, shape) if matrix else self._vector(name, shape)
        self.nbytes += value.nbytes
        return value

    def _matrix(self, name: str, shape: tuple[int, ...]) -> native.Matrix:
        kind = tensor_type(name, shape, self.type, tied=self.config.tie_word_embeddings)
        rows, cols = shape
        data = np.empty((rows, row_bytes(kind, cols)), np.uint8)
        pool = self._pool(kind, cols)
        step = max(1, min(len(pool), _STRETCH // data.shape[1]))
        jobs = [(first, int(self._rng.integers(len(pool)))) for first in range(0, rows, step)]

        def fill(job: tuple[int, int]) -> None:
            first, start = job
            part, turn = data[first:first + step], len(pool) - start
            part[:turn] = pool[start:start + len(part)]
            part[turn:] = pool[:max(0, len(part) - turn)]

        with ThreadPoolExecutor() as workers:  # most of the time goes into the first touch of new memory
            list(workers.map(fill, jobs))
        return native.Matrix(data, int(kind), rows, cols)

    def _pool(self, kind: GGMLType, cols: int) -> np.ndarray:
        """Encoded rows of that width, of a standard deviation that keeps the size of what goes through."""
        if (kind, cols) not in self._pools:
            x = self._rng.standard_normal((max(1, _POOL // cols), cols), dtype=np.float32) / np.float32(cols**0.5)
            self._pools[kind, cols] = np.asarray(encode(kind, x)).reshape(len(x), -1).view(np.uint8)
        return self._pools[kind, cols]

    def _vector(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        rng = self._rng
        if name.endswith("ssm_a"):
            value = -rng.uniform(0, 16, shape)
        elif name.endswith("ssm_dt.bias"):
            step = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), shape))
            value = np.log(np.expm1(step))  # softplus gives `step` back
        elif "conv1d" in name:
            value = rng.standard_normal(shape) / shape[-1]**0.5
        else:
            value = 1 + 0.1 * rng.standard_normal(shape)
        return value.astype(np.float32)
