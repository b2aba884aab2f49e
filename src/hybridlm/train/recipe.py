"""`Recipe`: everything that decides a training run, as one flat record, and how `key=value` changes it.

A recipe is a Python function that returns a `Recipe` (see `recipes/`); the command line overrides single settings by
name, and the architecture's by `model.NAME`. What cannot be is refused with the setting's name in front.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hybridlm.config import HybridConfig
from hybridlm.errors import ConfigError

__all__ = ["Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one run. Lengths are in optimiser steps, sizes in sequences and tokens."""

    model: HybridConfig

    # text
    data: str = ""  # a file, folder or glob of text, .jsonl(.gz, .zst) or .parquet
    out: str = ""  # the run's folder
    text: str = "text"  # the field of JSON lines and Parquet that holds the text
    label: str = "domain"  # the field that validation is reported by, where there is one
    val: str = ""  # text to validate on, never trained on; empty: `val_fraction` of data's documents
    val_fraction: float = 0.01
    tokenizer: str = ""  # a tokenizer.json or its folder; empty: train a BPE of `vocab` entries on data
    vocab: int = 4096

    # length
    steps: int = 1000
    seconds: float = 0.0  # > 0: instead of `steps`, end (schedule complete, model exported) within so much wall time
    batch: int = 16  # sequences an optimiser step
    microbatch: int = 0  # sequences at a time on the device; 0: the whole batch
    sequence: int = 256  # tokens a sequence
    mask_documents: bool = True  # documents packed into one sequence do not see each other

    # optimiser
    lr: float = 3e-3
    schedule: str = "wsd"  # wsd, cosine or linear
    warmup: int = 50
    decay: float = 0.2  # the share of the run over which WSD falls to `lr_end`
    lr_end: float = 0.0  # the last learning rate, as a share of `lr`
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # norm of the gradient; 0: no limit
    z_loss: float = 0.0
    seed: int = 0
    init: str = ""  # a model folder to start from; empty: fresh weights

    # machine
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "float32"  # of the computation: float32 or bfloat16; weights and optimiser stay float32
    compile: bool = False
    recompute: bool = False  # keep no activations within a block, compute them again going back
    threads: int = 0  # of the CPU; 0: PyTorch's choice

    # housekeeping
    save_every: int = 100
    keep: int = 3  # checkpoints
    val_every: int = 100
    val_tokens: int = 200_000  # during training; at the end all
    export_dtype: str = "bfloat16"  # of OUT/hf
    tensorboard: bool = True

    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for key in ("vocab", "batch", "sequence", "keep"):
            _check(getattr(self, key) > 0, key, "must be positive", getattr(self, key))
        for key in ("steps", "microbatch", "warmup", "save_every", "val_every", "val_tokens", "threads", "seconds",
                    "weight_decay", "clip", "z_loss", "seed"):
            _check(getattr(self, key) >= 0, key, "must not be negative", getattr(self, key))
        _check(self.steps > 0 or self.seconds > 0, "steps", "must be positive", self.steps)
        _check(self.lr > 0, "lr", "must be positive", self.lr)
        _check(self.eps > 0, "eps", "must be positive", self.eps)
        for key in ("beta1", "beta2", "val_fraction"):
            _check(0 <= getattr(self, key) < 1, key, "must be at least 0 and below 1", getattr(self, key))
        for key in ("decay", "lr_end"):
            _check(0 <= getattr(self, key) <= 1, key, "must be between 0 and 1", getattr(self, key))
        for key, known in (("schedule", ("wsd", "cosine", "linear")), ("dtype", ("float32", "bfloat16")),
                           ("export_dtype", ("float32", "bfloat16", "float16"))):
            _check(getattr(self, key) in known, key, f"must be one of {', '.join(known)}", getattr(self, key))
        if self.microbatch and self.batch % self.microbatch:
            raise ConfigError(f"microbatch: {self.microbatch} sequences do not divide batch={self.batch}")
        if self.sequence > self.model.max_position_embeddings:
            raise ConfigError(f"sequence: {self.sequence} tokens are more than the model's max_position_embeddings "
                              f"{self.model.max_position_embeddings}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    def override(self, settings: Mapping[str, str]) -> Recipe:
        """A copy with settings replaced by their texts ("lr" -> "1e-3", "model.hidden_size" -> "256")."""
        known = {f.name: f for f in fields(self) if f.name not in ("model", "name")}
        values: dict[str, Any] = {}
        shape: dict[str, Any] = {}
        for key, text in settings.items():
            if key.startswith("model."):
                name = key.removeprefix("model.")
                old = getattr(self.model, name, None)
                if name not in {f.name for f in fields(self.model) if f.init} or not isinstance(old, int | float):
                    raise ConfigError(f"{key}: not a number of HybridConfig that can be set here")
                shape[name] = _parse(key, text, type(old))
            elif key in known:
                values[key] = _parse(key, text, type(getattr(self, key)))
            else:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; settings are {', '.join(known)}"
                raise ConfigError(f"{key}: not a setting of recipe {self.name or 'given'}{hint}")
        if shape:
            values["model"] = self.model.with_(**shape)
        return replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the model as `HybridConfig.to_dict` has it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "model": self.model.to_dict()}

    def ready(self) -> Recipe:
        """Itself, once sure that it says what to read and where to write."""
        if not self.data:
            raise ConfigError("data: missing; give data=PATH (text, .jsonl or .parquet, a file or a folder)")
        if not self.out:
            raise ConfigError("out: missing; give out=DIR, the folder of the run")
        if Path(self.out).is_file():
            raise ConfigError(f"out: {self.out} is a file; give a folder")
        return self


def _check(good: bool, key: str, rule: str, value: Any) -> None:
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key}: {rule}, not {value!r}")


def _parse(key: str, text: str, kind: type) -> Any:
    """A setting's text as the type of its default."""
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ConfigError(f"{key}: must be true or false, not {text!r}")
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{key}: must be a number, not {text!r}") from None
    if kind is float:
        return number
    if not math.isfinite(number) or number != int(number):
        raise ConfigError(f"{key}: must be a whole number, not {text!r}")
    return int(text) if text.lstrip("+-").isdigit() else int(number)
