"""How fast a recipe trains on this machine: random tokens, no text, a line per combination of settings.

    python -m hybridlm.train.speed 190m microbatch=8,16,32 compile=true,false
    python -m hybridlm.train.speed hybridlm-tiny batch=64 profile=20        # and where the time goes

Values with commas are tried one after the other; `repeat` (8) steps are timed after 3 that are not. With `profile=N`
the N operators that take most of a step are listed after each line.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from hybridlm.data import TokenStream
from hybridlm.errors import HybridLMError
from hybridlm.model import HybridLM
from hybridlm.train.recipe import Recipe
from hybridlm.train.recipes import find
from hybridlm.train.trainer import Trainer

__all__ = ["measure", "sweep"]


def sweep(name: str, settings: Mapping[str, str]) -> None:
    """Print one line for each combination of the comma-separated values."""
    settings = dict(settings)
    repeat, rows = int(settings.pop("repeat", 8)), int(settings.pop("profile", 0))
    recipe = find(name)
    for values in itertools.product(*(v.split(",") for v in settings.values())):
        chosen = dict(zip(settings, values, strict=True))
        print("  ".join(f"{k}={v}" for k, v in chosen.items()) or name, end="  ", flush=True)
        try:
            print(measure(recipe.override(chosen), repeat, rows), flush=True)
        except torch.OutOfMemoryError:
            print("out of memory", flush=True)


def measure(recipe: Recipe, repeat: int = 8, rows: int = 0) -> str:
    """Tokens a second of a recipe's training step, and what it needs, in words."""
    torch._dynamo.reset()
    gc.collect()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    rng = np.random.default_rng(0)
    size = 4 * recipe.tokens_per_step
    tokens = rng.integers(recipe.model.vocab_size, size=size).astype(np.uint32)
    starts = np.unique(np.append(0, rng.integers(size, size=size // 2000)))
    stream = TokenStream((tokens,), (np.stack([starts, starts, np.zeros_like(starts)], 1),))
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(recipe, HybridLM(recipe.model), stream, stream, Path(out))
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            record = trainer.train_step(trainer.order.at(trainer.step))
        float(record["loss"])  # wait for the device
        return time.perf_counter() - began

    first = steps(1)
    steps(2)
    took = steps(repeat) / repeat
    told = [f"{recipe.tokens_per_step / took:,.0f} tok/s", f"{1000 * took:.1f} ms a step", f"first step {first:.1f} s"]
    if cuda:
        told.append(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    flops = 6 * recipe.model.num_parameters(embedding=False) + 6 * recipe.model.vocab_size * recipe.model.hidden_size
    told.append(f"{flops * recipe.tokens_per_step / took / 1e12:.2f} TFLOP/s of matrices")
    if rows:
        activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
        with torch.profiler.profile(activities=activities) as profile:
            steps(2)
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        told.append("\n" + profile.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60))
    return "  ".join(told)


def main() -> None:
    name, *settings = sys.argv[1:] or [""]
    if not name or not all("=" in s for s in settings):
        sys.exit("usage: python -m hybridlm.train.speed RECIPE key=value[,value...] ...")
    try:
        sweep(name, dict(s.split("=", 1) for s in settings))
    except HybridLMError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
