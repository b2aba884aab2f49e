"""`hybridlm export RUN|CHECKPOINT -o DIR|FILE.gguf`: a model out of a training run, at any moment of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli._common import note, size


def command(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run (its newest good checkpoint), "
                                           "one checkpoint of it, or a model folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR|FILE.gguf", help="A Hugging Face folder, or one GGUF "
                                      "file.")],
    type: Annotated[str, typer.Option("--type", help="Of a GGUF file: q8_0, q4_m, f16, ...")] = "q8_0",
    dtype: Annotated[str, typer.Option("--dtype", help="Of a folder: float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Write a checkpoint as a Hugging Face folder or as a GGUF file, whatever processes it was saved by.

    hybridlm export runs/first -o first.gguf --type q8_0
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter("must be float32, bfloat16 or float16", param_hint="--dtype")
    import torch

    from hybridlm.cli._progress import Stages
    from hybridlm.train.export import export

    with Stages() as stages:
        path = export(source, out, type=type, dtype=getattr(torch, dtype),
                      progress=lambda done, total, *_: stages(f"writing {out}", done, total))
    files = [path] if path.is_file() else list(path.iterdir())
    note(f"{path} ({size(sum(f.stat().st_size for f in files))})")
