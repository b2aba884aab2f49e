"""Weights in the memory of a GPU: from a GGUF file, from a folder of safetensors, or made up.

Matrices that share their input lie in one, row blocks one below the other (q, k, v, gate, a, b of a Gated DeltaNet
layer; q, k, v of attention; gate and up of the MLP), so that one product serves them all. What the walk gets for each
is a `Part` of it. Quantised matrices are decoded to the type of activations; vectors and taps are float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybridlm.config import HybridConfig
from hybridlm.engine.weights import expected_tensors
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType, dequantize
from hybridlm.formats.checkpoint import Checkpoint
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.hf_config import read_config, read_generation_eos
from hybridlm.formats.names import specs

__all__ = ["DeviceLoader", "Folder", "Part", "Read", "gguf_reader", "random_reader"]

Read = Callable[[str, tuple[int, ...], bool], Tensor]  # name, shape, is a matrix -> numbers of any kind, anywhere

_FUSED = (("attn_q", "attn_k", "attn_v", "attn_gate", "ssm_alpha", "ssm_beta"), ("ffn_gate", "ffn_up"),
          ("ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v"))
_BLOCK = 8 << 20  # numbers decoded at a time


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Places `first` to `last` (exclusive) along an axis of the fused matrix `data`: rows, or of taps columns."""

    data: Tensor
    first: int
    last: int
    axis: int = 0

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * (self.data.nbytes // self.data.shape[self.axis])

    @property
    def taps(self) -> Tensor:
        """[W, channels] of this convolution."""
        return self.data[:, self.first:self.last]


class DeviceLoader:
    """A `weights.Loader` that places what `read` gives. `nbytes` counts it."""

    def __init__(self, config: HybridConfig, read: Read, device: torch.device, dtype: torch.dtype) -> None:
        self.read, self.device, self.dtype = read, device, dtype
        self.nbytes = 0
        self._shapes = expected_tensors(config)
        self._fused: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], matrix: bool) -> Any:
        found = self.read(name, shape, matrix)
        if tuple(found.shape) != shape:
            raise FormatError(f"tensor {name} has shape {list(found.shape)} where the model's configuration needs "
                              f"{list(shape)}; convert the model again")
        self.nbytes += found.numel() * (self.dtype.itemsize if matrix else 4)
        if not matrix and "conv1d" not in name:
            return found.to(self.device, torch.float32).contiguous()
        data, first = self._place(name)
        (data if matrix else data.T)[first:first + shape[0]].copy_(found)
        return Part(data, first, first + shape[0], 0 if matrix else 1)

    def _place(self, name: str) -> tuple[Tensor, int]:
        """The matrix that a tensor is part of, made with its first part, and where in it the part begins."""
        block, _, role = name.removesuffix(".weight").rpartition(".")
        group = next((i for i, roles in enumerate(_FUSED) if block and role in roles), None)
        if group is None:
            return torch.empty(self._shapes[name], dtype=self.dtype, device=self.device), 0
        heights = {r: self._shapes.get(f"{block}.{r}.weight", (0,))[0] for r in _FUSED[group]}
        cols = self._shapes[name][1]
        if (block, group) not in self._fused:
            # Rows filled up, so that results have rows that begin at multiples of 128 bytes.
            rows = -(-sum(heights.values()) // 64) * 64
            taps = group == 2
            self._fused[block, group] = torch.zeros((cols, rows) if taps else (rows, cols), device=self.device,
                                                    dtype=torch.float32 if taps else self.dtype)
        before = _FUSED[group][:_FUSED[group].index(role)]
        return self._fused[block, group], sum(heights[r] for r in before)


def gguf_reader(file: GGUFFile) -> Read:
    """Tensors of an open file, decoded by all processors, block by block."""

    def read(name: str, shape: tuple[int, ...], matrix: bool) -> Tensor:
        info = file.tensors.get(name)
        if info is None:
            raise FormatError(f"{file.path}: tensor {name} is missing; convert the model again")
        data = file.data(name)
        direct = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
        if info.type in direct:
            return torch.from_numpy(data.copy()).view(direct[info.type]).view(info.shape)
        rows, cols = info.shape
        out = np.empty(info.shape, np.float32)
        step = max(1, _BLOCK // cols)
        row_bytes = data.nbytes // rows

        def decode(first: int) -> None:
            part = data[first * row_bytes:(first + step) * row_bytes]
            out[first:first + step] = dequantize(info.type, part, (part.nbytes // row_bytes, cols))

        with ThreadPoolExecutor() as workers:
            list(workers.map(decode, range(0, rows, step)))
        return torch.from_numpy(out)

    return read


class Folder:
    """A Hugging Face folder as a model file: what an `Engine` asks of a `GGUFFile`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_config(path)
        more = [i for i in read_generation_eos(path) if i not in config.eos_token_ids]
        self.config = config.with_(eos_token_id=(*config.eos_token_ids, *more)) if more else config
        self._checkpoint = Checkpoint.open(path)
        self._checkpoint.check(self.config)
        self._specs = {spec.gguf: spec for spec in specs(self.config)}

    @property
    def tokenizer_json(self) -> str | None:
        file = self.path / "tokenizer.json"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def chat_template(self) -> str | None:
        from hybridlm.text.chat import ChatTemplate

        template = ChatTemplate.from_folder(self.path)
        return template.source if template else None

    @property
    def fingerprint(self) -> str:
        """Of the configuration, and of samples of every tensor."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name in self._checkpoint.tensors:
            data = self._checkpoint.raw(name)
            for at in (0, len(data) // 2, max(0, len(data) - 1024)):
                digest.update(data[at:at + 1024].tobytes())
        return digest.hexdigest()

    def read(self, name: str, shape: tuple[int, ...], matrix: bool) -> Tensor:
        """A tensor by its GGUF name, as `Read` has it."""
        spec = self._specs[name]
        info = self._checkpoint.tensors[spec.name]
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        if info.dtype in kinds:
            value = torch.from_numpy(self._checkpoint.raw(spec.name).copy()).view(kinds[info.dtype])
        else:
            value = torch.from_numpy(self._checkpoint.array(spec.name).copy())
        if name.endswith(".ssm_a"):
            value = -value.double().exp().float()
        return value.view(spec.shape)

    def close(self) -> None:
        """Nothing to let go of: the weights are on the device."""


def random_reader(seed: int, device: torch.device) -> Read:
    """Numbers of plausible size, made on the device; the same distributions as `random_weights`."""
    g = torch.Generator(device).manual_seed(seed)

    def read(name: str, shape: tuple[int, ...], matrix: bool) -> Tensor:
        if matrix:
            return torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16) * shape[1]**-0.5
        if name.endswith("ssm_a"):
            return -16 * torch.rand(shape, generator=g, device=device)
        if name.endswith("ssm_dt.bias"):
            low, high = np.log(1e-3), np.log(0.1)
            return torch.expm1((low + (high - low) * torch.rand(shape, generator=g, device=device)).exp()).log()
        noise = torch.randn(shape, generator=g, device=device)
        return noise / shape[-1]**0.5 if "conv1d" in name else 1 + 0.1 * noise

    return read
