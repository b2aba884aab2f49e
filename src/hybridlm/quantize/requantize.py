"""GGUF -> GGUF with the same writer and the same policy as conversion.

Metadata is carried over as it is. Tensors that have their target type already are copied; others pass through float32.
Start from f32, bf16 or f16: a file that is quantised already is accepted down to q8_0, and refused below, because its
errors would be built in twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybridlm import __version__
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import SIZES, GGMLType, dequantize
from hybridlm.formats.convert import Summary, write_model
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.gguf_writer import Entry, Progress
from hybridlm.formats.names import Spec
from hybridlm.formats.policy import recipe

__all__ = ["quantize"]

PRECISE = {GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.F64, GGMLType.Q8_0}


def quantize(
    source: str | Path, out: str | Path, type: str, progress: Progress | None = None, *,
    importance: Mapping[str, np.ndarray] | None = None, allow_requantize: bool = False, resume: bool = False,
) -> Summary:
    """Write the model in `source` to `out` with its matrices in `type`, a ggml type or a mix.

    `importance`: GGUF name -> float32 [cols], the weight of each input column's error. `allow_requantize` accepts
    sources below 8 bits. Raises `FormatError`; stopped at any moment, it leaves no file `out`. With `resume` it leaves
    `out`.partial then, and the same call goes on from there.
    """
    wanted = recipe(type)
    if Path(source).resolve() == Path(out).resolve():
        raise FormatError(f"{out}: is the source too; give another name for the result")
    with GGUFFile.open(source) as file:
        file.check()

        def ready(spec: Spec, kind: GGMLType) -> np.ndarray | None:
            held = file.tensors[spec.gguf].type
            if held == kind:
                return file.data(spec.gguf)
            if held not in PRECISE and not allow_requantize:
                raise FormatError(f"{source}: {spec.gguf} is {held.name.lower()} already; quantise from an f16, bf16 "
                                  "or q8_0 file of the same model instead")
            return None

        def rows(spec: Spec, start: int, stop: int) -> np.ndarray:
            t = file.tensors[spec.gguf]
            block, size = SIZES[t.type]
            cols = t.shape[-1] if len(t.shape) > 1 else 1
            raw = file.data(spec.gguf)[start * cols // block * size : stop * cols // block * size]
            return dequantize(t.type, raw, (stop - start, cols))

        entries = {key: Entry.copy(value) for key, value in file.metadata.raw.items()
                   if key != "general.alignment"}
        made_from = f"{__version__} {file.fingerprint} {Path(source).stat().st_mtime_ns} {_digest(importance or {})}"
        return write_model(out, file.config, entries, wanted, rows, ready=ready, importance=importance,
                           progress=progress, resume=made_from if resume else None)


def _digest(importance: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(importance):
        digest.update(name.encode() + np.ascontiguousarray(importance[name], np.float32).tobytes())
    return digest.hexdigest()
