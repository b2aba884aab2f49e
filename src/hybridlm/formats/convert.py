"""A Hugging Face folder -> one GGUF file, in a memory that does not grow with the model.

Tensors pass through in blocks of rows: mapped safetensors -> float32 -> the type that `policy.py` gives the tensor. The
file carries the tokenizer, the chat template and the whole configuration, and appears under its name when complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.config import HybridConfig
from hybridlm.errors import FormatError
from hybridlm.formats.blocks import GGMLType, block_size
from hybridlm.formats.checkpoint import Checkpoint
from hybridlm.formats.encode import can_encode, encodable, encode
from hybridlm.formats.gguf_reader import ARCHITECTURE
from hybridlm.formats.gguf_writer import Entry, Progress, TensorPlan, write_gguf
from hybridlm.formats.hf_config import read_config, read_generation_eos
from hybridlm.formats.metadata import file_type, model_entries
from hybridlm.formats.names import Spec, specs
from hybridlm.formats.policy import MIXES, Mix, base_type, recipe, tensor_type
from hybridlm.formats.vocabulary import tokenizer_entries

__all__ = ["Summary", "convert", "write_model"]

BLOCK_BYTES = 8 << 20  # of float32 at a time
Rows = Callable[[Spec, int, int], np.ndarray]  # -> float32 [stop - start, cols]
Ready = Callable[[Spec, GGMLType], "np.ndarray | None"]  # -> bytes that can be copied as they are


def __getattr__(attribute: str) -> Any:
    """`TYPES`: the names that `convert` takes here, found out when first asked for."""
    if attribute == "TYPES":
        can = {t for t in encodable() if t != GGMLType.F64}
        return (*(t.name.lower() for t in encodable() if t in can),
                *(name for name, mix in MIXES.items() if {mix.base, *mix.roles.values()} <= can))
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written."""

    path: Path
    type: str
    nbytes: int
    parameters: int
    tensors: int
    types: dict[str, int]  # type -> number of tensors
    fallbacks: dict[str, str]  # matrices whose rows do not fit the type -> the type they got
    has_tokenizer: bool
    has_chat_template: bool

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"path": str(self.path), "type": self.type, "bytes": self.nbytes, "parameters": self.parameters,
                "bits_per_weight": round(self.bits_per_weight, 3), "tensors": self.tensors, "types": self.types,
                "fallbacks": self.fallbacks, "has_tokenizer": self.has_tokenizer,
                "has_chat_template": self.has_chat_template}


def convert(
    source: str | Path, out: str | Path, type: str = "q8_0", progress: Progress | None = None, *,
    name: str | None = None,
) -> Summary:
    """Convert a model folder to the GGUF file `out`, its matrices in `type` ("f32", "bf16", "q8_0", "q4_0", ...) or in
    the types of a mix ("q4_m", ...).

    `progress` is called with (bytes written, bytes in all). Raises `ConfigError` or `FormatError` naming what
    the folder lacks, `DiskFullError` when `out` has no room. Stopped at any moment, it leaves no file `out`.
    """
    source = Path(source)
    wanted = recipe(type)
    config = read_config(source)
    more = [i for i in read_generation_eos(source) if i not in config.eos_token_ids]
    if more:
        config = config.with_(eos_token_id=(*config.eos_token_ids, *more))
    checkpoint = Checkpoint.open(source)
    checkpoint.check(config)
    entries = model_entries(config, name or source.resolve().name) | tokenizer_entries(source, config)

    def rows(spec: Spec, start: int, stop: int) -> np.ndarray:
        block = checkpoint.rows(spec.name, start, stop)
        return _negated_exponential(block) if spec.gguf.endswith(".ssm_a") else block

    return write_model(out, config, entries, wanted, rows, progress=progress)


def write_model(
    out: str | Path, config: HybridConfig, entries: Mapping[str, Entry], wanted: GGMLType | Mix, rows: Rows, *,
    ready: Ready | None = None, importance: Mapping[str, np.ndarray] | None = None, progress: Progress | None = None,
    resume: str | None = None,
) -> Summary:
    """Write every tensor of a model in the type that the policy gives it, from whatever `rows` reads.

    `ready` may return a tensor's finished bytes, which are then copied. `importance`: GGUF name -> weight of each
    column's error. `resume`: see `write_gguf`.
    """
    plans: list[TensorPlan] = []
    types: Counter[str] = Counter()
    fallbacks: dict[str, str] = {}
    base = base_type(wanted)
    _require_encoder(base, "this model")
    for spec in specs(config):
        kind = tensor_type(spec.gguf, spec.shape, wanted, tied=config.tie_word_embeddings)
        copied = ready(spec, kind) if ready else None
        if copied is None:
            _require_encoder(kind, spec.gguf)
        if spec.matrix and spec.shape[-1] % block_size(base) and kind != GGMLType.F32:
            fallbacks[spec.gguf] = kind.name.lower()
        types[kind.name.lower()] += 1
        plans.append(TensorPlan(spec.gguf, spec.shape, kind,
                                _encoder(spec, kind, rows, copied, (importance or {}).get(spec.gguf))))
    size = write_gguf(out, ARCHITECTURE, {**entries, **file_type(base, wanted.name)}, plans, progress, resume=resume)
    return Summary(Path(out), wanted.name.lower(), size, config.num_parameters(), len(plans), dict(types), fallbacks,
                   "tokenizer.huggingface.json" in entries, "tokenizer.chat_template" in entries)


def _require_encoder(kind: GGMLType, what: str) -> None:
    if not can_encode(kind):
        raise FormatError(f"type {kind.name.lower()} (for {what}) cannot be written; these can: "
                          f"{', '.join(t.name.lower() for t in encodable())}")


def _encoder(spec: Spec, kind: GGMLType, rows: Rows, copied: np.ndarray | None, importance: np.ndarray | None
             ) -> Callable[[], Iterator[np.ndarray]]:
    """What yields a tensor's bytes."""
    count = spec.hf_shape[0]
    cols = prod(spec.hf_shape[1:])

    def copy() -> Iterator[np.ndarray]:
        assert copied is not None
        for at in range(0, copied.nbytes, BLOCK_BYTES):
            yield copied[at : at + BLOCK_BYTES]

    def produce() -> Iterator[np.ndarray]:
        step = max(1, BLOCK_BYTES // (4 * cols))
        spans = [(start, min(start + step, count)) for start in range(0, count, step)]
        with ThreadPoolExecutor(1) as reader:  # reads and converts the next rows while these are encoded
            coming = reader.submit(rows, spec, *spans[0])
            for (start, stop), after in zip(spans, [*spans[1:], None], strict=True):
                block = coming.result().reshape(stop - start, cols)
                if after:
                    coming = reader.submit(rows, spec, *after)
                try:
                    yield encode(kind, block, importance)
                except FormatError as error:
                    raise FormatError(f"tensor {spec.name}: {error}") from None

    return produce if copied is None else copy


def _negated_exponential(a_log: np.ndarray) -> np.ndarray:
    """-exp(A_log), rounded once."""
    with np.errstate(over="ignore"):
        return (-np.exp(a_log.astype(np.float64))).astype(np.float32)
