"""How much each input column of each matrix matters: mean squared activations over calibration text.

A weight's rounding error reaches the output times the activation it meets, so encoders weigh the error of a column by
the mean square of what flows into it. `collect` reads text with the CPU engine and adds these squares up; the file it
writes is GGUF in the layout of llama.cpp's importance matrices (`NAME.in_sum2` and `NAME.counts` for a matrix NAME),
with a checksum and what is needed to go on where an interrupted collection stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.config import HybridConfig
from hybridlm.errors import DataError, FormatError
from hybridlm.formats.blocks import GGMLType
from hybridlm.formats.gguf_reader import GGUFFile
from hybridlm.formats.gguf_writer import Entry, TensorPlan, strings, text, u32, write_gguf
from hybridlm.formats.names import specs

__all__ = ["TOKENS", "WINDOW", "Importance", "collect"]

TOKENS = 32_768
WINDOW = 2048  # tokens read in one piece; the state starts empty with each
SAVE_EVERY = 60.0  # seconds

Progress = Callable[[int, int], None]  # tokens read, tokens in all


@dataclass
class Importance:
    """Sums of squares of what each matrix multiplied, by GGUF name."""

    sums: dict[str, np.ndarray] = field(default_factory=dict)  # float64 [cols]
    counts: dict[str, int] = field(default_factory=dict)  # rows that were added up
    source: tuple[str, ...] = ()  # names of the text's files
    windows: int = 0
    window: int = WINDOW
    progress: dict[str, Any] = field(default_factory=dict)  # what a collection needs to go on: see `collect`

    def add(self, name: str, x: np.ndarray) -> None:
        """Rows of activations [T, cols] that flow into matrix `name`."""
        square = np.einsum("ti,ti->i", x, x, dtype=np.float64)
        if name in self.sums:
            self.sums[name] += square
        else:
            self.sums[name] = square
        self.counts[name] = self.counts.get(name, 0) + len(x)

    def weights(self) -> dict[str, np.ndarray]:
        """Name -> mean squares, float32 [cols]: the `importance` of encoders."""
        return {name: (sums / max(1, self.counts[name])).astype(np.float32) for name, sums in self.sums.items()}

    @property
    def digest(self) -> str:
        """Of all figures; changes with every bit."""
        digest = hashlib.sha256()
        for name in sorted(self.sums):
            sums = self.sums[name].astype("<f4")
            digest.update(f"{name} {len(sums)} {self.counts[name]}\n".encode() + sums.tobytes())
        return digest.hexdigest()

    def check(self, config: HybridConfig, where: str | Path) -> None:
        """Raise `FormatError` unless there are figures for each of the model's matrices, of its widths."""
        for spec in specs(config):
            if not spec.matrix or (spec.gguf == "token_embd.weight" and not config.tie_word_embeddings):
                continue
            if spec.gguf not in self.sums:
                raise FormatError(f"{where}: has nothing about {spec.gguf}; it was collected from another model")
            if (have := len(self.sums[spec.gguf])) != spec.shape[1]:
                raise FormatError(f"{where}: {spec.gguf} has {have} columns where the model has {spec.shape[1]}; it "
                                  "was collected from another model")

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all."""
        entries: dict[str, Entry] = {
            "general.type": text("imatrix"), "imatrix.datasets": strings(list(self.source) or ["unknown"]),
            "imatrix.chunk_count": u32(self.windows), "imatrix.chunk_size": u32(self.window),
            "hybridlm.importance.sha256": text(self.digest),
        }
        if self.progress:
            entries["hybridlm.importance.progress"] = text(json.dumps(self.progress))
        plans: list[TensorPlan] = []
        for name in sorted(self.sums):
            sums, count = self.sums[name].astype("<f4"), np.array([self.counts[name]], "<f4")
            plans.append(TensorPlan(f"{name}.in_sum2", (1, sums.size), GGMLType.F32, partial(_bytes, sums)))
            plans.append(TensorPlan(f"{name}.counts", (1, 1), GGMLType.F32, partial(_bytes, count)))
        write_gguf(path, "imatrix", entries, plans)

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read a file of `save`, or of llama.cpp's imatrix tool in its GGUF form. Raises `FormatError`."""
        found = cls()
        with GGUFFile.open(path) as file:
            if file.metadata.get("general.type") != "imatrix":
                raise FormatError(f"{path}: is no importance matrix; hybridlm quantize --calibrate TEXT makes one")
            for name, tensor in file.tensors.items():
                matrix, _, kind = name.rpartition(".")
                if tensor.type != GGMLType.F32 or kind not in ("in_sum2", "counts"):
                    raise FormatError(f"{path}: holds {name[:100]!r}, which no importance matrix has")
                values = file.array(name).astype(np.float64).reshape(-1)
                if not np.isfinite(values).all() or (values < 0).any():
                    raise FormatError(f"{path}: {name} has values that no sum of squares has; the file is damaged")
                if kind == "in_sum2":
                    found.sums[matrix] = values
                elif values.size != 1:
                    raise FormatError(f"{path}: {matrix} has several experts, which these models do not")
                else:
                    found.counts[matrix] = round(float(values[0]))
            if not found.sums or found.sums.keys() != found.counts.keys():
                raise FormatError(f"{path}: sums and counts do not belong together; the file is damaged")
            digest = file.metadata.get("hybridlm.importance.sha256")
            if digest is not None and digest != found.digest:
                raise FormatError(f"{path}: its checksum does not fit; the file is damaged, collect it again")
            found.source = tuple(str(s) for s in file.metadata.get("imatrix.datasets", ()))
            found.windows = int(file.metadata.get("imatrix.chunk_count", 0))
            found.window = int(file.metadata.get("imatrix.chunk_size", 0))
            found.progress = json.loads(file.metadata.get("hybridlm.importance.progress", "{}"))
        return found


def collect(
    model: str | Path, texts: Iterable[str | Path], out: str | Path | None = None, *, tokens: int = TOKENS,
    window: int = WINDOW, threads: int | None = None, progress: Progress | None = None,
) -> Importance:
    """Read up to `tokens` tokens of text files with the model in a GGUF file, and return what was seen.

    `out` is where the result is saved, now and then while it grows too: stopped at any moment, the same call goes on
    from there, and a finished file is added to when more tokens are asked for. Documents follow one another, an
    end-of-text token before each, and are read `window` tokens at a time. Raises `FormatError` and `DataError`.
    """
    from hybridlm import native
    from hybridlm.engine.cpu import CPU, file_loader
    from hybridlm.engine.layout import Layout
    from hybridlm.engine.walk import Batch, forward
    from hybridlm.engine.weights import bind

    paths = [Path(p) for p in texts]
    found = Importance(source=tuple(p.name for p in paths), window=window)

    class Watching(CPU):
        """Adds up the squares of what matrices are multiplied with."""

        def linear(self, x: np.ndarray, *weights: Any) -> tuple[np.ndarray, ...]:
            for weight in weights:
                found.add(names[id(weight)], x)
            return super().linear(x, *weights)

    if threads is not None:
        native.set_threads(threads)
    names: dict[int, str] = {}
    with GGUFFile.open(model) as file:
        file.check()
        read = file_loader(file, str(model))

        def load(name: str, shape: tuple[int, ...], matrix: bool) -> Any:
            handle = read(name, shape, matrix)
            names[id(handle)] = name
            return handle

        weights = bind(file.config, load)
        layout = Layout.of(file.config, file.fingerprint, "f32")
        ops = Watching(file.config, layout)
        state = ops.state()
        settings = {"model": file.fingerprint, "window": window}
        saved = _saved(out, settings)
        windows = islice(_windows(_tokenizer(file, model), paths, min(window, file.config.max_position_embeddings)),
                         max(-(-tokens // window), saved.windows if saved else 0))
        digest = hashlib.sha256()
        total, saved_at = 0, time.monotonic()
        for ids in windows:
            digest.update(ids.tobytes())
            found.windows += 1
            total += len(ids)
            if saved and found.windows <= saved.windows:
                if found.windows == saved.windows:
                    _same_text(saved, digest.hexdigest(), out)
                    found.sums, found.counts = saved.sums, saved.counts
                continue
            state.reset()
            hidden = forward(weights, ops, Batch.of([(state, ids)]))
            found.add(names[id(weights.head)], hidden)
            if progress:
                progress(min(total, tokens), tokens)
            if out is not None and time.monotonic() - saved_at > SAVE_EVERY:
                found.progress = {**settings, "read": digest.hexdigest()}
                found.save(out)
                saved_at = time.monotonic()
    if saved and found.windows < saved.windows:  # the text is shorter than what was read
        _same_text(saved, "", out)
    if not total:
        raise DataError(f"{', '.join(map(str, paths))}: no text to calibrate with")
    found.progress = {**settings, "read": digest.hexdigest()}
    if out is not None:
        found.save(out)
    return found


def _same_text(saved: Importance, digest: str, out: str | Path | None) -> None:
    if saved.progress.get("read") != digest:
        raise FormatError(f"{out}: was collected from another text; remove it, or give another name")


def _bytes(values: np.ndarray) -> list[np.ndarray]:
    return [values.view(np.uint8)]


def _saved(out: str | Path | None, settings: dict[str, Any]) -> Importance | None:
    """What an earlier collection with the same settings left."""
    if out is None or not Path(out).is_file():
        return None
    found = Importance.load(out)
    if any(found.progress.get(key) != value for key, value in settings.items()):
        raise FormatError(f"{out}: was collected from another model or with other settings; remove it, or give another "
                          "name")
    return found


def _tokenizer(file: GGUFFile, model: str | Path) -> Any:
    from hybridlm.text.tokenizer import Tokenizer

    source = file.tokenizer_json
    if source is None:
        raise FormatError(f"{model}: has no tokenizer, so it cannot read text; convert it from a folder that has one")
    eos = file.config.eos_token_ids
    return Tokenizer.from_json(source, eos=eos[0] if eos else None)


def _windows(tokenizer: Any, paths: list[Path], window: int) -> Iterator[np.ndarray]:
    """int32 [window] arrays of the documents' tokens, the last one shorter."""
    from hybridlm.evals.bits_per_byte import documents_of

    held: list[int] = []
    for document in documents_of(paths):
        held += [] if tokenizer.eos is None else [tokenizer.eos]
        held += tokenizer.encode(document.text, special=False)
        while len(held) >= window:
            yield np.array(held[:window], np.int32)
            held = held[window:]
    if len(held) > 1:
        yield np.array(held, np.int32)
