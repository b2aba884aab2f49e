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

# What must not differ between a checkpoint and the recipe that resumes it.
FIXED = ("model", "batch", "sequence", "seed", "mask_documents", "optimizer", "packing")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of one run. Lengths are in optimiser steps, sizes in sequences and tokens."""

    model: HybridConfig

    # text
    data: str = ""  # a file, folder or glob of text, .jsonl(.gz, .zst) or .parquet; hub:NAME; a:0.7,b:0.3 is a mixture
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
    packing: str = "stream"  # documents one behind the other, cut anywhere; or "whole": placed so that few are cut
    repetition: int = 0  # a sequence with a phrase of up to 13 tokens so many times in a row has no loss; 0: off

    # optimiser
    optimizer: str = "adamw"  # adamw, or muon: hidden matrices on Muon, the rest on AdamW
    lr: float = 3e-3
    schedule: str = "wsd"  # wsd, wsds, cosine or linear; see `schedule.py`
    warmup: int = 50
    decay: float = 0.2  # the share of the run (WSD-S: of each stretch) over which the rate falls to `lr_end`
    decays: str = ""  # WSD-S: where decays end, in multiples of 20 tokens a weight: 0.5,1,2; the run's end is one more
    lr_end: float = 0.0  # the last learning rate, as a share of `lr`
    weight_decay: float = 0.1
    decay_all: bool = False  # decay all but the token table, as AI2 does; else norms, gates and convolutions are spared
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # Muon's
    eps: float = 1e-8
    clip: float = 1.0  # norm of the gradient; 0: no limit
    skip_sigma: float = 6.0  # leave out a batch whose loss or gradient lies so many deviations above the mean; 0: off
    skip_window: int = 128  # of so many batches
    z_loss: float = 0.0
    seed: int = 0
    init: str = ""  # a model folder, a run or one of its checkpoints to start from; empty: fresh weights
    moments: bool = False  # take the optimizer's moments from the run `init` as well
    rope: str = ""  # change the positions of `init`: drop (none from here on) or yarn:FACTOR

    # machine
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "float32"  # of the computation: float32 or bfloat16; weights and optimiser stay float32
    compile: bool = False
    recompute: float = 0.0  # the share of blocks that keep no activations and compute them again going back
    threads: int = 0  # of the CPU; 0: PyTorch's choice
    dp_replicate: int = 0  # copies of the model, each on its own data; 0: as many as processes are left
    dp_shard: int = 1  # processes that share the weights, gradients and moments of one copy (FSDP)
    tp: int = 1  # processes that share each matrix
    cp: int = 1  # processes that share each sequence
    timeout: float = 120.0  # seconds after which a process that does not answer counts as lost

    # housekeeping
    save_every: int = 100
    keep: int = 3  # checkpoints
    permanent_every: int = 0  # steps; such checkpoints are kept for good
    val_every: int = 100
    val_tokens: int = 200_000  # during training; at the end all
    export_dtype: str = "bfloat16"  # of OUT/hf
    tensorboard: bool = True

    # logs
    sinks: str = ""  # MODULE:FUNCTION or FILE.py:FUNCTION that makes one more receiver of records, see `sinks.py`

    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for key in ("vocab", "batch", "sequence", "keep", "dp_shard", "tp", "cp", "timeout"):
            _check(getattr(self, key) > 0, key, "must be positive", getattr(self, key))
        for key in ("steps", "microbatch", "warmup", "save_every", "val_every", "val_tokens", "threads", "seconds",
                    "weight_decay", "clip", "z_loss", "seed", "skip_sigma", "repetition", "dp_replicate",
                    "permanent_every"):
            _check(getattr(self, key) >= 0, key, "must not be negative", getattr(self, key))
        _check(self.steps > 0 or self.seconds > 0, "steps", "must be positive", self.steps)
        _check(self.lr > 0, "lr", "must be positive", self.lr)
        _check(self.eps > 0, "eps", "must be positive", self.eps)
        for key in ("beta1", "beta2", "momentum", "val_fraction"):
            _check(0 <= getattr(self, key) < 1, key, "must be at least 0 and below 1", getattr(self, key))
        _check(self.skip_window >= 4, "skip_window", "must be at least 4", self.skip_window)
        for key in ("decay", "lr_end", "recompute"):
            _check(0 <= getattr(self, key) <= 1, key, "must be between 0 and 1", getattr(self, key))
        for key, known in (("schedule", ("wsd", "wsds", "cosine", "linear")), ("dtype", ("float32", "bfloat16")),
                           ("optimizer", ("adamw", "muon")), ("packing", ("stream", "whole")),
                           ("export_dtype", ("float32", "bfloat16", "float16"))):
            _check(getattr(self, key) in known, key, f"must be one of {', '.join(known)}", getattr(self, key))
        _check(bool(self.multiples) or self.schedule != "wsds", "decays", "must be given with schedule=wsds",
               self.decays)
        _check(self.schedule != "wsds" or not self.seconds, "schedule", "wsds counts steps, seconds= cannot bound it",
               self.schedule)
        _check(self.rope in ("", "drop") or self.yarn_factor > 1, "rope", "must be drop or yarn:FACTOR", self.rope)
        _check(not self.moments or bool(self.init), "moments", "needs init=RUN", self.moments)
        if self.microbatch and self.batch % self.microbatch:
            raise ConfigError(f"microbatch: {self.microbatch} sequences do not divide batch={self.batch}")
        if self.sequence > self.model.max_position_embeddings and not self.init:
            raise ConfigError(f"sequence: {self.sequence} tokens are more than the model's max_position_embeddings "
                              f"{self.model.max_position_embeddings}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    @property
    def multiples(self) -> list[float]:
        """`decays` as numbers."""
        try:
            numbers = [float(part) for part in self.decays.split(",") if part.strip()]
        except ValueError:
            raise ConfigError(f"decays: must be numbers with commas between, not {self.decays!r}") from None
        if any(not 0 < n < math.inf for n in numbers):
            raise ConfigError(f"decays: must be positive, not {self.decays!r}")
        return numbers

    @property
    def yarn_factor(self) -> float:
        """Of `rope=yarn:FACTOR`; 0 where it is something else."""
        kind, _, factor = self.rope.partition(":")
        return _parse("rope", factor, float) if kind == "yarn" and factor else 0.0

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

    def continues(self, other: Mapping[str, Any], out: Path) -> None:
        """Refuse to go on from the checkpoint of `other`, another recipe's `to_dict` read back, where that makes no
        sense."""
        before, now = _plain(other), _plain(self.to_dict())
        for key in FIXED:
            if before.get(key) != now[key]:
                told = "" if key == "model" else f" (it was {before.get(key)}, not {now[key]})"
                raise ConfigError(f"{key}: differs from the run in {out}{told}; keep it, or give another out=")

    def ready(self) -> Recipe:
        """Itself, once sure that it says what to read and where to write."""
        if not self.data:
            raise ConfigError("data: missing; give data=PATH (text, .jsonl or .parquet, a file or a folder)")
        if not self.out:
            raise ConfigError("out: missing; give out=DIR, the folder of the run")
        if Path(self.out).is_file():
            raise ConfigError(f"out: {self.out} is a file; give a folder")
        return self


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _check(good: bool, key: str, rule: str, value: Any) -> None:
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{key}: {rule}, not {value!r}")


def _parse(key: str, text: str, kind: type) -> Any:
    """A setting's text as the type of its default."""
    if kind is str:
        return text
    if kind is float and text.lower() in ("true", "false"):  # a share: all or nothing
        return float(text.lower() == "true")
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
