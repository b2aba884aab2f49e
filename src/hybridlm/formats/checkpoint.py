"""A Hugging Face folder of safetensors, read under canonical names whatever generation wrote it, and written.

Nothing is loaded on opening: files are mapped, and `rows` converts one block of rows at a time, so that a model of any
size passes through a small memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.atomic import atomic_write, atomic_write_all
from hybridlm.config import HybridConfig
from hybridlm.errors import FormatError
from hybridlm.formats.names import canonical, check, conv_parts, is_ignored, specs
from hybridlm.formats.safetensors import DTYPES, SafetensorsFile, TensorInfo, header, to_float32

__all__ = ["Checkpoint", "TensorInfo", "save_checkpoint"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Data = Any  # a buffer, an iterable of buffers, or a function that returns either


class Checkpoint:
    """An open folder. `tensors` lists what it holds by canonical name (see `names`)."""

    def __init__(self, folder: Path, files: dict[str, tuple[SafetensorsFile, str]]) -> None:
        """`files`: canonical name -> (file, name in the file), convolutions as the file has them."""
        self.folder = folder
        self._files = files
        held = {name: file.tensors[inner] for name, (file, inner) in files.items()}
        self._parts = conv_parts({name: info.shape for name, info in held.items()})
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in held.items():
            if not name.endswith(".linear_attn.conv1d.weight"):
                self.tensors[name] = TensorInfo(name, info.dtype, info.shape, info.nbytes)
        for name, pieces in self._parts.items():
            first = held[pieces[0][0]] if pieces else next(iter(held.values()))
            if {(held[p[0]].dtype, held[p[0]].shape[1:]) for p in pieces} != {(first.dtype, first.shape[1:])}:
                raise FormatError(f"{folder}: tensor {name} is spread over convolutions that do not fit together")
            shape = (sum(last - start for _, start, last in pieces), *first.shape[1:])
            self.tensors[name] = TensorInfo(name, first.dtype, shape, math.prod(shape) * DTYPES[first.dtype])

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Map `model.safetensors`, or the shards that `model.safetensors.index.json` names."""
        folder = Path(folder)
        files: dict[str, tuple[SafetensorsFile, str]] = {}
        for file, names in _files(folder):
            for inner in names:
                name = canonical(inner)
                if is_ignored(name):
                    continue
                if name in files:
                    raise FormatError(f"{folder}: tensor {name} occurs twice")
                files[name] = (file, inner)
        return cls(folder, files)

    def check(self, config: HybridConfig) -> None:
        """Raise `FormatError` unless these are exactly the tensors of a model of this configuration.

        A head that is stored although it is tied to the input table is passed over.
        """
        if config.tie_word_embeddings:
            self.tensors.pop("lm_head.weight", None)
        found = {name: info.shape for name, info in self.tensors.items()}
        check(found, {s.name: s.hf_shape for s in specs(config)}, str(self.folder))

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, little endian, uint8: in the mapped file, or a copy where the file cuts it up."""
        if name not in self._parts:
            file, inner = self._files[name]
            return file.raw(inner)
        return np.concatenate([self._slice(*piece) for piece in self._parts[name]])

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop (of the first axis) as float32 [stop - start, the other axes]."""
        info = self.tensors[name]
        step = info.nbytes // info.shape[0] if info.shape and info.shape[0] else 0
        block = to_float32(self.raw(name)[start * step : stop * step], info.dtype, name)
        return block.reshape((stop - start, *info.shape[1:]))

    def array(self, name: str) -> np.ndarray:
        """A whole tensor as float32."""
        info = self.tensors[name]
        return to_float32(self.raw(name), info.dtype, name).reshape(info.shape)

    def _slice(self, name: str, start: int, stop: int) -> np.ndarray:
        file, inner = self._files[name]
        info = file.tensors[inner]
        step = info.nbytes // info.shape[0]
        return file.raw(inner)[start * step : stop * step]


def _files(folder: Path) -> Iterator[tuple[SafetensorsFile, list[str]]]:
    """Each file of the model with the names it is asked for."""
    if (folder / SINGLE).is_file():
        file = SafetensorsFile(folder / SINGLE)
        yield file, list(file.tensors)
        return
    index = folder / INDEX
    if not index.is_file():
        raise FormatError(f"{folder}: holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face model")
    try:
        if index.stat().st_size > 64 << 20:
            raise FormatError(f"{index}: larger than any model's")
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, shard in places.items():
            shards.setdefault(shard, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{index}: damaged ({str(error)[:100]}); download it again") from None
    for shard, names in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise FormatError(f"{index}: damaged (shard {str(shard)[:100]!r} is not a file of this folder)")
        if not (folder / shard).is_file():
            raise FormatError(f"{folder}: shard {shard} is missing; download the model again")
        file = SafetensorsFile(folder / shard)
        for name in names:
            if name not in file.tensors:
                raise FormatError(f"{folder}: tensor {name[:100]} is missing from {shard}; download the model again")
        yield file, names


def save_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...], Data]],
    *,
    max_shard_bytes: int = 5 << 30,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write (name, dtype, shape, data) tuples as `model.safetensors`, or as shards with an index.

    `data` is a buffer of little-endian bytes, an iterable of such buffers, or a function that returns either and is
    called when its turn comes: give functions, and no more than one tensor is in memory. Each file appears whole or
    not at all; a checkpoint that was there before stays until all new files are on the disk.
    """
    folder = Path(folder)
    shards: list[list[tuple[TensorInfo, Data]]] = [[]]
    size = 0
    for name, dtype, shape, data in tensors:
        info = TensorInfo(name, dtype, tuple(shape), math.prod(shape) * DTYPES[dtype])
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((info, data))
        size += info.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    total = sum(info.nbytes for shard in shards for info, _ in shard)
    # While shards take their names, the folder holds no checkpoint rather than one of two halves.
    replacing = [folder / INDEX, folder / SINGLE] if count > 1 else []
    with atomic_write_all([folder / name for name in names], size=total, replacing=replacing) as files:
        for file, shard in zip(files, shards, strict=True):
            file.write(header([info for info, _ in shard], {"format": "pt", **(metadata or {})}))
            for info, data in shard:
                if sum(file.write(buffer) for buffer in _buffers(data)) != info.nbytes:
                    raise ValueError(f"{info.name}: data does not have the {info.nbytes} bytes of its shape")
    if count > 1:
        places = {info.name: name for name, shard in zip(names, shards, strict=True) for info, _ in shard}
        with atomic_write(folder / INDEX) as file:
            file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2).encode() + b"\n")
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for old in folder.glob("model-?????-of-?????.safetensors"):
        if old.name not in names:
            old.unlink(missing_ok=True)


def _buffers(data: Data) -> Iterable[Any]:
    if callable(data):
        data = data()
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data)
    return [data] if isinstance(data, np.ndarray | bytes | bytearray | memoryview) else data
