"""`hybridlm quantize SRC.gguf OUT.gguf --type T`: a GGUF file again, smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.cli._common import JsonOption, print_json

if TYPE_CHECKING:
    import numpy as np

    from hybridlm.cli._progress import Stages


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC.gguf", help="A GGUF file, best in f32, bf16 or f16.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type: Annotated[str, typer.Option("--type", help="A mix (q4_s, q4_m, q5_m, q6_m) or a type (q8_0, q4_0, "
                                                     "...).")] = "q4_m",
    calibrate: Annotated[list[Path] | None, typer.Option("--calibrate", metavar="TEXT", help="First read this text "
                                                         "with the model, to learn which columns matter.")] = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", metavar="FILE", help="What --calibrate learns is kept "
                                                 "here; alone: use what is there, llama.cpp's files too.")] = None,
    tokens: Annotated[int, typer.Option("--calibration-tokens", min=1, help="How much of the text is read.")] = 32_768,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="Accept a source below 8 bits; "
                                                                             "its errors are built in twice.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a GGUF file smaller: q8_0 halves bf16, q4_m nearly halves that again.

    Stopped, it leaves OUT.gguf.partial, and the same command goes on from there; calibration goes on from --imatrix.
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.cli.convert import show
    from hybridlm.quantize import quantize

    if source.is_dir():
        raise typer.BadParameter(f"{source} is a folder; hybridlm convert {source} {out} --type {type} does it at once",
                                 param_hint="SRC.gguf")
    with Stages() as stages:
        importance = _importance(source, calibrate, imatrix, tokens, stages) if calibrate or imatrix else None
        summary = quantize(source, out, type.lower(), lambda done, total, *_: stages(f"writing {out}", done, total),
                           importance=importance, allow_requantize=allow_requantize, resume=True)
    print_json(summary.to_dict()) if json else show(summary)


def _importance(source: Path, calibrate: list[Path] | None, imatrix: Path | None, tokens: int, stages: Stages
                ) -> dict[str, np.ndarray]:
    """Weights of columns: collected from text now, or read from a file."""
    from hybridlm.formats.gguf_reader import GGUFFile
    from hybridlm.quantize.importance import Importance, collect

    if calibrate:
        found = collect(source, calibrate, imatrix, tokens=tokens, progress=lambda done, total: stages.status(
            f"calibrating: {done:,} of {total:,} tokens"))
        if imatrix is None:
            return found.weights()
    assert imatrix is not None  # from the file also when it was just written, so that the next time is the same
    found = Importance.load(imatrix)
    with GGUFFile.open(source) as file:
        found.check(file.config, imatrix)
    return found.weights()
