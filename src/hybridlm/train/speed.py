"""How fast a recipe trains on this machine: random tokens, no text, a line per combination of settings.

    python -m hybridlm.train.speed 190m microbatch=8,16,32 compile=true,false
    python -m hybridlm.train.speed hybridlm-tiny batch=64 profile=20        # and where the time goes

Values with commas are tried one after the other; `repeat` (8) steps are timed after 3 that are not. With `profile=N`
the N kernels (on a CPU: operators) that take most of a step are listed after each line.

What is timed is `Trainer.train_step`, the very step that `hybridlm train` takes: forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from hybridlm.config import LINEAR, HybridConfig
from hybridlm.data import TokenStream
from hybridlm.errors import HybridLMError
from hybridlm.model import HybridLM
from hybridlm.train.recipe import Recipe
from hybridlm.train.recipes import find
from hybridlm.train.trainer import Trainer, pick_device

__all__ = ["Speed", "Stopwatch", "flops_per_token", "sweep"]

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by a word of the device's name


def flops_per_token(config: HybridConfig, sequence: int) -> float:
    """FLOP that a token's forward and backward need, nothing recomputed counted.

    6 x the weights of matrices, the head among them; 3 x the causal half of attention (2 products of 2 FLOP for each
    width and key that is seen); 3 x the delta rule in its recurrent form (8 FLOP for each entry of the state).
    """
    d, ff = config.hidden_size, config.intermediate_size
    keys, values = config.key_heads * config.key_dim, config.value_heads * config.value_dim
    total = 6.0 * config.vocab_size * d
    for i, kind in enumerate(config.layer_types):
        total += 6 * 3 * d * ff
        if kind == LINEAR:
            total += 6 * d * (2 * keys + 3 * values + 2 * config.value_heads)
            total += 3 * 8 * config.value_heads * config.key_dim * config.value_dim
        else:
            total += 6 * d * (2 * d + 2 * config.kv_heads * config.head_dim)
            window = min(config.window_of(i) or sequence, sequence)
            seen = window - window * (window - 1) / (2 * sequence)  # keys, the query itself among them, on average
            total += 3 * 4 * d * seen
    return total


@dataclass(frozen=True)
class Speed:
    """What steps took: `seconds` the median, `first` the first one, which compiles."""

    recipe: Recipe
    seconds: float
    first: float
    peak_bytes: int  # of the device's memory; 0 on a CPU
    device: str

    @property
    def tokens_per_second(self) -> float:
        return self.recipe.tokens_per_step / self.seconds

    @property
    def flops(self) -> float:
        """FLOP a second, as `flops_per_token` counts."""
        return flops_per_token(self.recipe.model, self.recipe.sequence) * self.tokens_per_second

    @property
    def mfu(self) -> float | None:
        """Share of the device's peak, where that is known and the arithmetic is bfloat16."""
        peak = next((peak for word, peak in PEAKS.items() if word in self.device), None)
        return self.flops / peak if peak and self.recipe.dtype == "bfloat16" else None

    def __str__(self) -> str:
        told = [f"{self.tokens_per_second:,.0f} tok/s", f"{1000 * self.seconds:.1f} ms a step",
                f"first step {self.first:.1f} s", f"{self.flops / 1e12:.2f} TFLOP/s"]
        if self.mfu is not None:
            told.append(f"{self.mfu:.1%} MFU")
        if self.peak_bytes:
            told.append(f"{self.peak_bytes / 1e9:.1f} GB")
        return "  ".join(told)


class Stopwatch:
    """A recipe's trainer on random tokens, with steps to be timed as often as one likes."""

    def __init__(self, recipe: Recipe, warm: int = 2) -> None:
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        rng = np.random.default_rng(0)
        size = 4 * recipe.tokens_per_step
        tokens = rng.integers(recipe.model.vocab_size, size=size).astype(np.uint32)
        starts = np.unique(np.append(0, rng.integers(size, size=size // 2000)))
        stream = TokenStream((tokens,), (np.stack([starts, starts, np.zeros_like(starts)], 1),))
        with torch.device(pick_device(recipe.device)):
            model = HybridLM(recipe.model, init=False)
        _fill(model)
        with tempfile.TemporaryDirectory() as out:
            self.trainer = Trainer(recipe, model, stream, stream, Path(out))
        self.recipe, self.times = recipe, list[float]()
        self.cuda = self.trainer.device.type == "cuda"
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.first = self.steps(1)
        self.steps(warm)

    def steps(self, count: int) -> float:
        """Seconds that `count` steps take together."""
        trainer = self.trainer
        batches = [trainer.order.at(trainer.step + i) for i in range(count)]  # a run reads ahead as well
        began = time.perf_counter()
        for batch in batches:
            record = trainer.train_step(batch)
        if count:
            float(record["loss"])  # wait for the device
        return time.perf_counter() - began

    def time(self, repeat: int, together: int = 1) -> None:
        """Add the times of `repeat` groups of steps."""
        self.times += [self.steps(together) / together for _ in range(repeat)]

    def speed(self) -> Speed:
        """Of all that was timed."""
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        return Speed(self.recipe, median(self.times), self.first, peak, name)

    def profile(self, rows: int) -> str:
        """What takes most of a step, a line each: milliseconds, share, calls, name."""
        activity = torch.profiler.ProfilerActivity.CUDA if self.cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            self.steps(2)
        events = [(e.self_device_time_total if self.cuda else e.self_cpu_time_total, e.count, e.key)
                  for e in profile.key_averages()]
        whole = sum(time for time, _, _ in events)
        lines = [f"{1e-3 * time / 2:9.2f} ms {time / whole:6.1%} {count // 2:6d} x {name[:90]}"
                 for time, count, name in sorted(events, reverse=True)[:rows]]
        return "\n".join([*lines, f"{1e-3 * whole / 2:9.2f} ms in all"])


@torch.no_grad()
def _fill(model: HybridLM) -> None:
    """Plausible weights, made where they are; `init_weights` gives the same on every device, which takes long."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1)
        elif name.endswith("A_log"):
            weight.uniform_(0, 2.7)
        elif name.endswith("dt_bias"):
            weight.uniform_(-7, -2)
        else:
            weight.normal_(0, 0.3 if "conv1d" in name else 0.02)


def sweep(name: str, settings: Mapping[str, str]) -> None:
    """Print one line for each combination of the comma-separated values."""
    settings = dict(settings)
    repeat, rows = int(settings.pop("repeat", 8)), int(settings.pop("profile", 0))
    recipe = find(name)
    for values in itertools.product(*(v.split(",") for v in settings.values())):
        chosen = dict(zip(settings, values, strict=True))
        print("  ".join(f"{k}={v}" for k, v in chosen.items()) or name, end="  ", flush=True)
        torch._dynamo.reset()
        gc.collect()
        try:
            watch = Stopwatch(recipe.override(chosen))
            watch.time(repeat)
            print(watch.speed(), flush=True)
            if rows:
                print(watch.profile(rows), flush=True)
            del watch
        except torch.OutOfMemoryError:
            print("out of memory", flush=True)


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
