"""Checkpoints that are either good or recognised as not: a folder, written aside, flushed, renamed.

    OUT/checkpoints/step-00000400/
        weights.safetensors     float32 parameters under their released names
        optimizer.pt            AdamW's moments and the generators' states
        state.json              step, clock, recipe: plain data
        manifest.json           size and sha256 of the three; written last, so that without it there is no checkpoint

Loading goes from the newest to the oldest, checks every byte, and takes the first that is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridlm.atomic import flush_files, flush_folder, write_file
from hybridlm.data.tokens import sha256_of
from hybridlm.errors import DataError, HybridLMError

__all__ = ["load_newest", "save"]

MANIFEST = "manifest.json"


def save(folder: Path, step: int, weights: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any],
         *, keep: int) -> Path:
    """Write the checkpoint of a step, then delete all but the newest `keep`."""
    final = folder / f"step-{step:08d}"
    aside = folder / f".step-{step:08d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(".step-*.tmp"):
            shutil.rmtree(rest)
        aside.mkdir()
        save_file({n: t.detach().cpu().contiguous() for n, t in weights.items()}, aside / "weights.safetensors")
        torch.save(optimizer, aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps(state), encoding="utf-8")
        flush_files(aside)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(aside.iterdir())}
        write_file(aside / MANIFEST, json.dumps(files, indent=1).encode())
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        aside.rename(final)
        flush_folder(folder)
    except HybridLMError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error).split("\n")[0]
        raise DataError(f"{final}: the checkpoint cannot be written ({reason}); the ones before it are untouched, "
                        "make room and run the same command again") from None
    for old in _all(folder)[keep:]:
        with suppress(OSError):
            shutil.rmtree(old)
    return final


def load_newest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]] \
        | None:
    """(weights, optimizer, state) of the newest whole checkpoint, or None when there is none at all.

    Damaged ones are told to `warn` and left in place. Raises `DataError` when there are checkpoints, all damaged.
    """
    found = _all(folder)
    for path in found:
        fault = _fault(path)
        if fault:
            warn(f"{path}: {fault}; falling back to the checkpoint before it")
            continue
        weights = load_file(path / "weights.safetensors")
        optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        return weights, optimizer, json.loads((path / "state.json").read_text(encoding="utf-8"))
    if found:
        raise DataError(f"{folder}: all {len(found)} checkpoints are damaged; delete the folder to start over")
    return None


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['bytes']}"
            if sha256_of(path / name) != entry["sha256"]:
                return f"{name} is damaged (sha256 differs)"
        missing = {"weights.safetensors", "optimizer.pt", "state.json"} - set(files)
        return f"{min(missing)} is not in its manifest" if missing else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({error})"

