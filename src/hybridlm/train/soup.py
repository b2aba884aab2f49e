"""`soup`: the mean of several checkpoints' weights, which often is better than any of them (model soups, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hybridlm.atomic import atomic_folder
from hybridlm.errors import ConfigError
from hybridlm.text import Tokenizer
from hybridlm.train.start import config_of, tokenizer_of, weights_of, whole_model

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
        for name, tensor in weights_of(path).items():
            part = tensor.double() * (share / sum(shares))
            total[name] = total[name] + part if name in total else part
    model = whole_model(config, {name: t.float() for name, t in total.items()})
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as aside:
        model.save_pretrained(aside, dtype=dtype)
        tokenizer = next((t for t in map(tokenizer_of, paths) if t is not None), None)
        if tokenizer is not None:
            Tokenizer.from_file(tokenizer).save(aside)
    return out
