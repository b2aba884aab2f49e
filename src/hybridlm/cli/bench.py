"""`hybridlm bench`: how fast a model reads and writes here, and how near that is to what the machine allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlm.cli._common import JsonOption, KVOption, ThreadsOption, count, peak_rss_bytes, print_json, resolved, size

if TYPE_CHECKING:
    from hybridlm.engine import Engine

PROBE_BYTES = 4 << 30  # many times any cache
FLOP_A_WEIGHT = 2  # of a token of a prompt: a multiplication and an addition


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A GGUF file, a model folder, or a hub "
                                                "repository: owner/name.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Instead of MODEL: random weights of this shape (tiny, "
                                                               "60m ... 1b, 7b, olmo3-7b), made in memory.")] = None,
    type: Annotated[str, typer.Option("--type", help="Type of the weights of --preset.")] = "q4_0",
    prompt: Annotated[int, typer.Option("--prompt", "-p", min=1, help="Tokens to read.")] = 512,
    generate: Annotated[int, typer.Option("--generate", "-g", min=1, help="Tokens to generate after them.")] = 64,
    contexts: Annotated[str | None, typer.Option("--contexts", "-c", help="Also measure at these depths of one growing "
                                                                          "text: 0,4096,8192.")] = None,
    repeat: Annotated[int, typer.Option("--repeat", "-r", min=1, help="Times to measure; the median counts.")] = 3,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="Also measure the machine: memory bandwidth and "
                                                                   "8-bit arithmetic.")] = True,
    threads: ThreadsOption = None,
    kv_type: KVOption = "f16",
    json: JsonOption = False,
) -> None:
    """Measure prefill and decode speed and memory, of a model or of random weights of a preset.

    Machines are noisy: compare figures from one sitting, with nothing else running.
    """
    if (model is None) == (preset is None):
        raise typer.BadParameter("give a MODEL or --preset, one of them", param_hint="MODEL")
    from hybridlm.engine import Engine

    depths = _depths(contexts)
    context = max(prompt, *depths, 0) + (1 + len(depths)) * generate + 1
    if preset is not None:
        from hybridlm.config import HybridConfig

        config = HybridConfig.preset(preset)
        opened = Engine.random(config, type, threads=threads, kv_type=kv_type, context=context, cache_bytes=0)
    else:
        opened = Engine.open(resolved(str(model)), threads=threads, kv_type=kv_type, context=context, cache_bytes=0)
    with opened as engine:
        figures = measure(engine, prompt, generate, repeat)
        figures |= {"model": f"random weights of {preset}, {type}" if preset else engine.name,
                    "parameters": engine.config.num_parameters(), "kv_type": kv_type}
        if depths:
            figures["contexts"] = over_contexts(engine, depths, generate)
        if probe:
            figures |= machine()
    if json:
        print_json(figures)
    else:
        show(figures)


def measure(engine: Engine, prompt: int, generate: int, repeat: int) -> dict[str, Any]:
    """Read `prompt` random tokens, then generate `generate` greedily one at a time; `repeat` times."""
    import numpy as np

    from hybridlm import native

    tokens = np.random.default_rng(0).integers(0, engine.config.vocab_size, prompt).astype(np.int32)
    engine.session().prefill(tokens[: min(prompt, 16)])  # map the weights, start the threads
    reads, steps = [], []
    for _ in range(repeat):
        session = engine.session()
        seconds, logits = _timed(lambda s=session: s.prefill(tokens))  # type: ignore[misc]
        reads.append(seconds)
        began = time.perf_counter()
        for _ in range(generate):
            logits = session.step(int(logits.argmax()))
        steps.append(time.perf_counter() - began)
    per_token = engine.decode_bytes_per_token(prompt + generate // 2)
    return {
        "prefill_tokens_per_s": prompt / median(reads),
        "decode_tokens_per_s": generate / median(steps),
        "model_bytes": engine.model_bytes,
        "decode_bytes_per_token": per_token,
        "decode_bytes_per_s": per_token * generate / median(steps),
        "state_bytes": engine.layout.fixed_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": native.threads(),
        "isa": native.isa(),
        "prefill_flop_per_token": FLOP_A_WEIGHT * prompt_weights(engine),
        "prompt_tokens": prompt,
        "generated_tokens": generate,
        "repeats": repeat,
        "prefill_tokens_per_s_all": [prompt / s for s in reads],
        "decode_tokens_per_s_all": [generate / s for s in steps],
    }


def prompt_weights(engine: Engine) -> int:
    """Weights that every token of a prompt meets: all but the input table and the head."""
    c = engine.config
    return c.num_parameters() - c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)


def over_contexts(engine: Engine, depths: list[int], generate: int) -> list[dict[str, float]]:
    """One text that grows: at each depth how fast the stretch up to there was read and the next tokens are written."""
    import numpy as np

    rng, session, rows = np.random.default_rng(0), engine.session(), []
    session.prefill([1])
    for depth in sorted(set(depths)):
        fresh, row = depth - session.position, {"context": float(depth)}
        if fresh > 0:
            tokens = rng.integers(0, engine.config.vocab_size, fresh).astype(np.int32)
            seconds, _ = _timed(lambda t=tokens: session.feed(t))  # type: ignore[misc]
            row["prefill_tokens_per_s"] = fresh / seconds
        logits, times = session.logits(), []
        for _ in range(generate):
            seconds, logits = _timed(lambda t=int(logits.argmax()): session.step(t))  # type: ignore[misc]
            times.append(seconds)
        row["decode_tokens_per_s"] = 1 / median(times)
        row["decode_bytes_per_token"] = engine.decode_bytes_per_token(session.position - generate // 2)
        rows.append(row)
    return rows


def machine() -> dict[str, float]:
    """What the machine can do at best with the same threads, measured now."""
    import numpy as np

    from hybridlm import native
    from hybridlm.engine.engine import _memory

    # Ones, so that it is memory and not the page of zeros; arrays of this size lie in large pages where there are any.
    data = np.ones(min(PROBE_BYTES, _memory() // 6), np.uint8)
    return {"read_bandwidth_bytes_per_s": max(native.read_bandwidth(data) for _ in range(6)),
            "int8_peak_ops_per_s": max(native.int8_peak(0.2) for _ in range(3)),
            "tile_peak_ops_per_s": max(native.tile_peak(0.2) for _ in range(3))}


def show(f: dict[str, Any]) -> None:
    """A small table, or two."""
    from rich.console import Console
    from rich.table import Table

    print(f"{f['model']}: {count(f['parameters'])} parameters, {size(f['model_bytes'])}")
    limit, prefill_ops = f.get("read_bandwidth_bytes_per_s"), f["prefill_tokens_per_s"] * f["prefill_flop_per_token"]
    table = Table(show_header=False)
    table.add_row(f"prefill, {f['prompt_tokens']} tokens", f"{f['prefill_tokens_per_s']:,.1f} tokens/s")
    table.add_row(f"decode, {f['generated_tokens']} tokens", f"{f['decode_tokens_per_s']:,.2f} tokens/s")
    table.add_row("moved for a token", size(f["decode_bytes_per_token"]))
    table.add_row("decode moves", f"{size(f['decode_bytes_per_s'])}/s")
    if limit:
        table.add_row("the machine reads", f"{size(limit)}/s (decode reaches {f['decode_bytes_per_s'] / limit:.0%})")
        for name, key in (("8-bit dot products", "int8_peak_ops_per_s"), ("bfloat16 tiles", "tile_peak_ops_per_s")):
            if peak := f[key]:
                table.add_row(name, f"{peak / 1e12:.2f} TOPS (prefill reaches {prefill_ops / peak:.0%})")
    table.add_row("peak memory", size(f["peak_rss_bytes"]))
    table.add_row("threads", f"{f['threads']}, {f['isa']}")
    Console().print(table)
    if "contexts" in f:
        depths = Table("context", "prefill up to there", "decode", "moved for a token", *["share"] if limit else [])
        for row in f["contexts"]:
            speed, moved = row["decode_tokens_per_s"], row["decode_bytes_per_token"]
            prefill = row.get("prefill_tokens_per_s")
            depths.add_row(f"{row['context']:,.0f}", f"{prefill:,.1f} tokens/s" if prefill else "",
                           f"{speed:,.2f} tokens/s", size(moved), *[f"{speed * moved / limit:.0%}"] if limit else [])
        Console().print(depths)


def _depths(text: str | None) -> list[int]:
    try:
        depths = [int(part) for part in (text or "").split(",") if part.strip()]
        if any(d < 0 for d in depths):
            raise ValueError
    except ValueError:
        raise typer.BadParameter("give token counts, commas between: 0,4096,8192", param_hint="--contexts") from None
    return depths


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
