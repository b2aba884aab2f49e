"""`hybridlm soup CKPT CKPT... -o OUT`: the mean of several checkpoints' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CKPT CKPT...", help="Runs, checkpoints of runs, or "
                                                      "model folders of one architecture.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The model folder to write.")],
    weights: Annotated[str, typer.Option("--weights", metavar="W,W,...", help="The share of each; equal when left "
                                                                              "out.")] = "",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Average the weights of checkpoints, for instance of one stage trained with several seeds.

    hybridlm soup runs/midtrain-1 runs/midtrain-2 -o runs/midtrain
    """
    try:
        shares = [float(w) for w in weights.split(",")] if weights else []
    except ValueError:
        raise typer.BadParameter(f"{weights!r} is not W,W,..., for instance 1,2", param_hint="--weights") from None
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter("must be float32, bfloat16 or float16", param_hint="--dtype")
    import torch

    from hybridlm.cli._common import note
    from hybridlm.train.soup import soup

    soup(checkpoints, out, weights=shares, dtype=getattr(torch, dtype))
    note(f"the mean of {len(checkpoints)} checkpoints is in {out}")
