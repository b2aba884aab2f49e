"""`hybridlm quickstart`: the whole road once, on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes.")] = Path("runs/quickstart"),
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="How long to train.")] = 90.0,
) -> None:
    """Corpus, tokenizer, training, evaluation, quantised file, text: all in minutes.

    The corpus is the Python standard library of this machine; nothing is downloaded. OUT/hf is the trained model,
    OUT/model-q8_0.gguf what `hybridlm generate` opens.
    """
    from hybridlm.quickstart import quickstart

    quickstart(out, seconds=seconds)
