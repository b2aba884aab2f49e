"""`soup`: the mean of several checkpoints' weights, which often is better than any of them (model soups, 2022)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridlm.atomic import flush_files, flush_folder
from hybridlm.errors import ConfigError
from hybridlm.model import HybridLM
from hybridlm.text import Tokenizer
from hybridlm.train.checkpoint import read_weights
from hybridlm.train.start import config_of, is_run, whole_model

__all__ = ["soup"]


def soup(paths: Sequence[str | Path], out: str | Path, *, weights: Sequence[float] = (),
         dtype: torch.dtype = torch.float32) -> Path:
    """Write the weighted mean of runs, checkpoints or model folders into `out`, a model folder with a tokenizer.

    Args:
        weights: the share of each, brought to a sum of 1; none: equal shares.
        dtype: of what is written; sums are float64.

    Raises `ConfigError` when the models do not match, or `out` holds something else.
    """
    out = Path(out)
    if len(paths) < 2:
        raise ConfigError("soup: needs two checkpoints or more")
    shares = list(weights) or [1.0] * len(paths)
    if len(shares) != len(paths) or not min(shares) >= 0 or not sum(shares) > 0:
        raise ConfigError(f"weights: {len(shares)} given for {len(paths)} checkpoints; give each a number, not all 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; give another folder")
    config, _ = config_of(paths[0])
    total: dict[str, Tensor] = {}
    for path, share in zip(paths, shares, strict=True):
        if config_of(path)[0] != config:
            raise ConfigError(f"{path}: another architecture than {paths[0]}; only the same model can be averaged")
        held = _read(path)
        for name, tensor in held.items():
            part = tensor.double() * (share / sum(shares))
            total[name] = total[name] + part if name in total else part
    model = whole_model(config, {name: t.float() for name, t in total.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, dtype=dtype)
    tokenizer = next((t for t in map(_tokenizer, paths) if t is not None), None)
    if tokenizer is not None:
        tokenizer.save(aside)
    flush_files(aside)
    aside.rename(out)
    flush_folder(out.parent)
    return out


def _read(path: str | Path) -> dict[str, Tensor]:
    return read_weights(path) if is_run(path) else HybridLM.from_pretrained(path, dtype=torch.float32).state_dict()


def _tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer beside a model: in its folder, or in the run that the checkpoint belongs to."""
    path = Path(path)
    for folder in (path, path / "tokenizer", path.parent.parent / "tokenizer"):
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(folder)
    return None
