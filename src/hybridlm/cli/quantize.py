"""`hybridlm quantize SRC.gguf OUT.gguf --type T`: a GGUF file again, smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli._common import JsonOption, print_json


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC.gguf", help="A GGUF file, best in f32, bf16 or f16.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type: Annotated[str, typer.Option("--type", help="q8_0, q4_0, ...")] = "q4_0",
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="Accept a source below 8 bits; "
                                                                             "its errors are built in twice.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a GGUF file smaller: q8_0 halves bf16, q4_0 halves that again."""
    from hybridlm.cli._progress import Stages
    from hybridlm.cli.convert import show
    from hybridlm.quantize import quantize

    if source.is_dir():
        raise typer.BadParameter(f"{source} is a folder; hybridlm convert {source} {out} --type {type} does it at once",
                                 param_hint="SRC.gguf")
    with Stages() as stages:
        summary = quantize(source, out, type.lower(), lambda done, total, *_: stages(f"writing {out}", done, total),
                           allow_requantize=allow_requantize)
    print_json(summary.to_dict()) if json else show(summary)
