"""The full training step on a GPU: forward, backward, clipping and AdamW, of the very step that `hybridlm train` takes.

    python -m benchmarks.gpu_train_step mfu      # 1b and 190m at 8k tokens: tokens/s and share of the card's peak
    python -m benchmarks.gpu_train_step twin     # 1b beside its transformer twin at 8k, 32k and 64k, interleaved
    python -m benchmarks.gpu_train_step peer     # beside transformers + fla, and transformers with our operations
    python -m benchmarks.gpu_train_step memory   # peak bytes at 4k, 32k and 64k tokens, and what fits in 24, 80, 141 GB
    python -m benchmarks.gpu_train_step --warm 1b,8192,16,4 &     # compile ahead, several at a time: only saves waiting

Bfloat16 activations, float32 weights and moments, blocks compiled, random tokens. FLOP are those of
`hybridlm.train.speed.flops_per_token`; nothing recomputed counts. `--json FILE` appends one object a line.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hybridlm import HybridConfig
from hybridlm.model import HybridLM
from hybridlm.train.recipe import Recipe
from hybridlm.train.recipes import find
from hybridlm.train.speed import Speed, Stopwatch, flops_per_token

LENGTHS = (8192, 32_768, 65_536)
LINES: list[dict[str, Any]] = []


def recipe(name: str, sequence: int, batch: int, microbatch: int = 0, **settings: Any) -> Recipe:
    base = find(name)
    model = base.model.with_(max_position_embeddings=max(sequence, base.model.max_position_embeddings))
    return replace(base, model=model, sequence=sequence, batch=batch, microbatch=microbatch, dtype="bfloat16",
                   compile=True, **{"mask_documents": False, **settings})


def fresh() -> None:
    """Nothing left of what was measured before."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def tell(what: str, speed: Speed, **more: Any) -> None:
    r = speed.recipe
    line = {"what": what, "sequence": r.sequence, "batch": r.batch, "microbatch": r.microbatch or r.batch,
            "documents": r.mask_documents, "recompute": r.recompute,
            "tokens_per_second": round(speed.tokens_per_second), "ms": round(1000 * speed.seconds, 2),
            "mfu": round(speed.mfu or 0, 4), "peak_gb": round(speed.peak_bytes / 1e9, 2), **more}
    LINES.append(line)
    extra = "  ".join(f"{k} {v}" for k, v in more.items())
    print(f"{what:24s} {r.sequence:6d} x {r.batch:<3d} (by {r.microbatch or r.batch}) {speed} {extra}", flush=True)


def mfu(repeat: int) -> None:
    for name, batch, by, settings in (("1b", 16, 4, {}), ("1b", 16, 4, {"mask_documents": True}), ("190m", 32, 8, {}),
                                      ("190m", 2, 2, {})):
        fresh()
        watch = Stopwatch(recipe(name, 8192, batch, by, **settings), warm=1)
        watch.time(repeat)
        tell(name + (" documents" if settings else ""), watch.speed())
        del watch


def twin(repeat: int) -> None:
    """Both trainers live side by side and their steps alternate; at 64k, where they don't fit, one after the other."""
    for sequence in LENGTHS:
        fresh()
        batch = max(1, 16_384 // sequence)
        recipes = [recipe(name, sequence, batch) for name in ("1b-twin", "1b")]
        if sequence < 65_536:
            pair = [Stopwatch(r, warm=1) for r in recipes]
            for _ in range(repeat):
                for watch in pair:
                    watch.time(1)
            theirs, ours = (watch.speed() for watch in pair)
            theirs, ours = (replace(s, peak_bytes=0) for s in (theirs, ours))  # that of both
            del pair, watch
        else:
            theirs, ours = (alone(r, min(repeat, 3)) for r in recipes)
        tell("1b-twin", theirs)
        tell("1b", ours, ratio=round(ours.tokens_per_second / theirs.tokens_per_second, 3))


def alone(r: Recipe, repeat: int) -> Speed:
    """One trainer's speed, and its memory given back."""
    watch = Stopwatch(r, warm=0)
    watch.time(repeat)
    speed = watch.speed()
    del watch
    fresh()
    return speed


def warm(name: str, sequence: int, batch: int, microbatch: int) -> None:
    """Fill the compiler's caches: one step of a model with one block of each kind, all that is compiled."""
    full = recipe(name, sequence, batch, microbatch)
    kinds = tuple(dict.fromkeys(full.model.layer_types))
    watch = Stopwatch(replace(full, model=full.model.with_(layer_types=kinds, vocab_size=1024)), warm=0)
    print(f"compiled {name} for {microbatch} x {sequence}: {watch.first:.1f} s", flush=True)


def peer(repeat: int, sequence: int = 8192, batch: int = 1) -> None:
    """transformers, eager, in bfloat16 throughout (cheaper than what we do, so to its favour), with fla."""
    from hybridlm.formats.hf_config import to_hf

    ours = Stopwatch(recipe("1b", sequence, batch), warm=1)
    config = to_hf(recipe("1b", sequence, batch).model)
    peers = {"transformers + fla": _transformers(config, fla=True, hook=False, sequence=sequence, batch=batch)}
    for _ in range(repeat):
        ours.time(1)
        for step in peers.values():
            step()
    speed = ours.speed()
    for name, step in peers.items():
        rate = sequence * batch / median(step.times[1:])
        LINES.append({"what": name, "sequence": sequence, "batch": batch, "tokens_per_second": round(rate),
                      "note": "timing only: fla's backward gives wrong gradients on this Triton"})
        print(f"{name:24s} {sequence:6d} x {batch:<3d} {rate:,.0f} tok/s (timing only: its gradients are wrong on "
              "this Triton)", flush=True)
        tell("1b", speed, against=name, ratio=round(speed.tokens_per_second / rate, 2))
    del ours, peers, step
    fresh()
    hooked = _transformers(config, fla=True, hook=True, sequence=sequence, batch=batch)
    for _ in range(repeat + 1):
        hooked()
    faster = sequence * batch / median(hooked.times[1:])
    LINES.append({"what": "transformers + hybridlm", "sequence": sequence, "batch": batch,
                  "tokens_per_second": round(faster), "ratio_to_fla": round(faster / rate, 3)})
    print(f"{'transformers + hybridlm':24s} {sequence:6d} x {batch:<3d} {faster:,.0f} tok/s, {faster / rate:.2f} x its "
          "speed with fla", flush=True)


def few_configs(count: int) -> None:
    """Let Triton's autotuner try only so many configurations of a kernel, of 4 warps before others."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def shorter(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        best = sorted(configs or [], key=lambda c: (abs(c.num_warps - 4), abs(c.num_stages - 3)))[:count]
        original(self, fn, arg_names, best, *args, **kwargs)

    Autotuner.__init__ = shorter  # type: ignore[method-assign]


def _transformers(config: dict[str, Any], *, fla: bool, hook: bool, sequence: int, batch: int) -> Any:
    import transformers

    if fla:
        import fla.ops.common.chunk_o as chunk_o  # its backward refuses on Triton 3.4 to 3.7.0; only its time is asked

        chunk_o.TRITON_ABOVE_3_7_1 = True
    if hook:
        from hybridlm.integrations import transformers as ours

        ours.enable()
    model = transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**config)).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(model.config.vocab_size, (batch, sequence), device="cuda")

    def step() -> None:
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        step.times.append(time.perf_counter() - began)

    step.times = []
    step()
    return step


def memory(repeat: int) -> None:
    """Peaks of training one sequence of the 1b shapes, and of reading a prompt with the 7B's shapes."""
    for name in ("1b", "1b-twin"):
        peaks = {}
        for sequence in (4096, 32_768, 65_536):
            try:
                speed = alone(recipe(name, sequence, 1), 1)
                peaks[sequence] = speed.peak_bytes
                tell(f"{name} training", speed)
            except torch.OutOfMemoryError:
                fresh()
                print(f"{name} training {sequence}: out of memory", flush=True)
        if len(peaks) > 1:
            first, last = min(peaks), max(peaks)
            each = (peaks[last] - peaks[first]) / (last - first)
            fits(f"{name} training", peaks[first] - each * first, each * 1024, "thousand tokens at a time")
    for name in ("7b", "olmo3-7b"):
        inference(name)


def fits(what: str, fixed: float, each: float, unit: str) -> None:
    """How many fit in cards of three sizes, 3% left free."""
    counts = {gb: max(0, int((0.97 * gb * 1e9 - fixed) / each)) for gb in (24, 80, 141)}
    LINES.append({"what": what, "fixed_gb": round(fixed / 1e9, 2), "mb_each": round(each / 1e6, 2), "unit": unit,
                  "fits": counts})
    print(f"{what}: {fixed / 1e9:.1f} GB and {each / 1e6:.0f} MB each; {unit} that fit: "
          + ", ".join(f"{count} in {gb} GB" for gb, count in counts.items()), flush=True)


@torch.no_grad()
def inference(name: str, part: int = 4096) -> None:
    """Bytes that one sequence's cache takes after a prompt read `part` tokens at a time, bfloat16 weights."""
    fresh()
    config = HybridConfig.preset(name)
    with torch.device("meta"):
        model = HybridLM(config, init=False).to(torch.bfloat16)
    model.to_empty(device="cuda")
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    model._place_frequencies()
    weights = torch.cuda.memory_allocated()
    for length in (4096, 32_768, 65_536):
        cache, ids = model.new_cache(), torch.randint(config.vocab_size, (1, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for at in range(0, length, part):
            model.hidden(ids[:, at:at + part], cache=cache)
        held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated()
        LINES.append({"what": f"{name} inference", "tokens": length, "weights_gb": round(weights / 1e9, 2),
                      "cache_gb": round(cache.nbytes / 1e9, 3), "held_gb": round(held / 1e9, 3),
                      "peak_gb": round(peak / 1e9, 2)})
        print(f"{name} inference, {length} tokens: weights {weights / 1e9:.2f} GB, cache {cache.nbytes / 1e9:.3f} GB "
              f"({held / 1e9:.3f} GB held), peak {peak / 1e9:.2f} GB", flush=True)
        fits(f"{name} inference at {length}", peak - cache.nbytes, cache.nbytes, "sequences")
        del cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=("mfu", "twin", "peer", "memory", []))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--fla-configs", type=int, default=0, metavar="N",
                        help="let fla's autotuner try only N configurations a kernel (0: all, most of a minute)")
    parser.add_argument("--warm", metavar="NAME,SEQUENCE,BATCH,MICROBATCH")
    parser.add_argument("--json", help="a file that gets one object a line")
    o = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a CUDA device, and PyTorch sees none")
    if o.warm:
        name, *sizes = o.warm.split(",")
        warm(name, *map(int, sizes))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; 1b at 8k needs "
          f"{flops_per_token(find('1b').model, 8192) / 1e9:.2f} GFLOP a token", flush=True)
    if o.fla_configs:
        few_configs(o.fla_configs)
    for what in o.what:
        {"mfu": mfu, "twin": twin, "peer": peer, "memory": memory}[what](o.repeat)
    if o.json:
        with Path(o.json).open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in LINES)


if __name__ == "__main__":
    main()
