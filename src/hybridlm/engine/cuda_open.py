"""Engines on a GPU: `Engine.open(..., device="cuda")` and `Engine.random(..., device="cuda")` end here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from hybridlm.config import HybridConfig
from hybridlm.engine.cuda import CUDA
from hybridlm.engine.cuda_state import KV_DTYPES
from hybridlm.engine.cuda_weights import DeviceLoader, Folder, Read, gguf_reader, random_reader
from hybridlm.engine.layout import Layout
from hybridlm.engine.weights import bind
from hybridlm.errors import HybridLMError
from hybridlm.formats.gguf_reader import GGUFFile

__all__ = ["open_engine", "random_engine"]

CHECKPOINT_EVERY = 4096  # tokens: passes of few rows waste a GPU

E = TypeVar("E")


def open_engine(kind: type[E], path: str | Path, device: str = "cuda", *, kv_type: str | None = None,
                exact: bool = False, cache_bytes: int | None = None, invariant: bool = False,
                ops: dict[str, Any] | None = None, **options: Any) -> E:
    """An engine on a GGUF file or on a Hugging Face folder of safetensors, whose weights become bfloat16.

    `exact`: float32 instead, with tf32 off: the reference for measuring. `invariant`, `ops`: options of `CUDA`.
    """
    place, path = _device(device), Path(path)
    file: Any = Folder(path) if path.is_dir() else GGUFFile.open(path)
    try:
        read = file.read if isinstance(file, Folder) else gguf_reader(file)
        return _engine(kind, file.config, read, file.fingerprint, place, kv_type, exact, cache_bytes,
                       {"invariant": invariant, **(ops or {})}, name=path.stem, file=file, **options)
    except BaseException:
        file.close()
        raise


def random_engine(kind: type[E], config: HybridConfig, seed: int = 0, device: str = "cuda", *,
                  kv_type: str | None = None, exact: bool = False, cache_bytes: int | None = None,
                  invariant: bool = False, ops: dict[str, Any] | None = None, **options: Any) -> E:
    """Random weights, made on the device in bfloat16: for measuring speed at any size. It has no tokenizer."""
    place = _device(device)
    read = random_reader(seed, place)
    return _engine(kind, config, read, f"random {seed} {config}", place, kv_type, exact, cache_bytes,
                   {"invariant": invariant, **(ops or {})}, name="random-bf16", **options)


def _engine(kind: Any, config: HybridConfig, read: Read, fingerprint: str, device: torch.device, kv_type: str | None,
            exact: bool, cache_bytes: int | None, ops: dict[str, Any], **options: Any) -> Any:
    dtype = torch.float32 if exact else torch.bfloat16
    kv_type = kv_type or ("f32" if exact else "bf16")
    if kv_type not in KV_DTYPES:
        raise HybridLMError(f"kv_type: {kv_type!r} is not for a GPU; {', '.join(KV_DTYPES)} are")
    layout = Layout.of(config, fingerprint, kv_type)
    loader = DeviceLoader(config, read, device, dtype)
    try:
        with torch.no_grad():
            weights = bind(config, loader)
    except torch.OutOfMemoryError:
        raise HybridLMError(f"device: the model does not fit in {device}'s memory; a smaller model, or "
                            'device="cpu" with quantised weights') from None
    if exact:  # an independent reference: PyTorch's own operations, nothing recorded
        ops = {**ops, "kernels": False, "graphs": False}
    options["checkpoint_every"] = options.get("checkpoint_every") or CHECKPOINT_EVERY
    made = CUDA(config, layout, device, dtype, **ops)
    cache_bytes = made.memory() // 10 if cache_bytes is None else cache_bytes  # a tenth of what the model leaves
    return kind(weights, made, layout, device=str(device), cache_bytes=cache_bytes, model_bytes=loader.nbytes,
                **options)


def _device(device: str) -> torch.device:
    place = torch.device(device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise HybridLMError('device: PyTorch finds no CUDA device here; use device="cpu"')
        if (place.index or 0) >= torch.cuda.device_count():
            raise HybridLMError(f"device: {device} is not there; this machine has {torch.cuda.device_count()}")
    return place


