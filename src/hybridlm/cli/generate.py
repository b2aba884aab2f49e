"""`hybridlm generate MODEL PROMPT`: continue a text, streamed as it comes."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybridlm.cli._common import (
    ContextOption,
    DeviceOption,
    DraftOption,
    JsonOption,
    KVOption,
    MinPOption,
    ModelArgument,
    PenaltyOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    note,
    open_engine,
    peak_rss_bytes,
    print_json,
    printable,
    size,
)
from hybridlm.engine.chat import turn_end

if TYPE_CHECKING:
    from hybridlm.engine import Engine, Generation


def command(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue; stdin when "
                                                                       "left out.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=0, help="Most tokens to generate.")] = 256,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the output; repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take PROMPT as a message and answer it by the model's chat "
                                                      "template.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Afterwards, speed and memory on stderr.")] = False,
    json: JsonOption = False,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = None,
    draft: DraftOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    context: ContextOption = None,
    kv_type: KVOption = None,
) -> None:
    """Continue a prompt, streaming the text.

    hybridlm generate models/hybridlm-tiny-q8_0.gguf "The steam engine" --max-tokens 100 --stats
    """
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or text on stdin", param_hint="PROMPT")
        prompt = sys.stdin.read()
    machine: dict[str, Any] = {"device": device, "threads": threads, "context": context, "kv_type": kv_type}
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(model, **machine))
        guesser = stack.enter_context(open_engine(draft, **machine, cache_bytes=0)) if draft else False
        options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop or (), "temperature": temperature,
                                   "top_k": top_k, "top_p": top_p, "min_p": min_p,
                                   "repetition_penalty": repetition_penalty, "seed": seed, "speculative": guesser}
        if chat and engine.chat_template is not None and (end := turn_end(engine)):
            options["stop"] = (*options["stop"], end)
        generation = (engine.chat([{"role": "user", "content": prompt}], **options) if chat
                      else engine.generate(prompt, **options))
        clean = printable if sys.stdout.isatty() else str
        try:
            if echo and not json:
                print(clean(prompt), end="", flush=True)
            for piece in generation:
                if piece.text and not json:
                    print(clean(piece.text), end="", flush=True)
        finally:
            if not json:
                print(flush=True)
            if stats:
                note(summary(engine, generation))
        if json:
            print_json(figures(engine, generation))


def figures(engine: Engine, generation: Generation) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "text": generation.text,
        "tokens": generation.tokens,
        "prompt_tokens": generation.prompt_tokens,
        "reused_tokens": generation.reused_tokens,
        "generated_tokens": len(generation.tokens),
        "finish_reason": generation.finish_reason,
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        "prefill_tokens_per_s": generation.prefill_tokens_per_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "model": engine.name,
        "model_bytes": engine.model_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def summary(engine: Engine, generation: Generation) -> str:
    """One line for people."""
    reused = f", {generation.reused_tokens} of them reused" if generation.reused_tokens else ""
    return (f"[prompt {generation.prompt_tokens} tokens{reused}, {generation.prefill_tokens_per_s:.0f} tokens/s | "
            f"generated {len(generation.tokens)} tokens, {generation.decode_tokens_per_s:.1f} tokens/s | "
            f"model {size(engine.model_bytes)}, peak memory {size(peak_rss_bytes())}]")
