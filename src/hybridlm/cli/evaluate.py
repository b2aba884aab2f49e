"""`hybridlm eval bpb MODEL FILE...`: how well a model predicts given text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.cli._common import JsonOption, KVOption, ModelArgument, ThreadsOption, open_engine, print_json, size

if TYPE_CHECKING:
    from hybridlm.evals import BitsPerByte

app = typer.Typer(no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Measure quality: bits per byte on your own files."""


@app.command()
def bpb(
    model: ModelArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text, .jsonl(.gz, .zst) or .parquet files, or "
                                                                        "folders of them.")],
    text: Annotated[str, typer.Option("--text", help="The field of JSON lines and Parquet that holds text.")] = "text",
    context: Annotated[int | None, typer.Option("--context", min=2, help="Tokens of a window; the model's own when "
                                                                         "left out.")] = None,
    threads: ThreadsOption = None,
    kv_type: KVOption = "f16",
    json: JsonOption = False,
) -> None:
    """Bits per byte of text: lower is better, and models with different tokenizers compare.

    hybridlm eval bpb MODEL book.txt notes/
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.evals import bits_per_byte, documents_of

    with open_engine(model, threads=threads, kv_type=kv_type, cache_bytes=0) as engine, Stages() as stages:
        began = time.perf_counter()
        result = bits_per_byte(engine, engine.tokenizer, documents_of(files, text_field=text), context=context,
                               progress=lambda sums: stages.status(f"{size(sums.bytes)} of text, "
                                                                   f"{sums.bits_per_byte:.4f} bits per byte so far"))
        seconds = time.perf_counter() - began
    if json:
        return print_json({**_figures(result), "labels": {k: _figures(v) for k, v in sorted(result.labels.items())},
                           "seconds": seconds, "tokens_per_s": result.tokens / seconds, "model": engine.name})
    print(f"{result.bits_per_byte:.4f} bits per byte ({result.documents:,} documents, {size(result.bytes)}, "
          f"{result.tokens:,} tokens, {result.tokens / seconds:,.0f} tokens/s)")
    if len(result.labels) > 1:
        for label, part in sorted(result.labels.items()):
            print(f"  {label:<20}{part.bits_per_byte:.4f} ({size(part.bytes)})")
    return None


def _figures(r: BitsPerByte) -> dict[str, float]:
    return {"bits_per_byte": r.bits_per_byte, "bytes": r.bytes, "tokens": r.tokens, "documents": r.documents}
