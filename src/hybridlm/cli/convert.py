"""`hybridlm convert SRC OUT.gguf --type T`: a Hugging Face folder or hub repository as one GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybridlm.cli._common import JsonOption, print_json, size

if TYPE_CHECKING:
    from hybridlm.formats.convert import Summary


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder with config.json and safetensors, or a hub "
                                                              "repository: owner/name or owner/name@revision.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.")],
    type: Annotated[str, typer.Option("--type", help="f32, bf16, f16, q8_0, q4_0, ..., or a mix: q4_m, q5_m, q6_m, "
                                                     "q4_s.")] = "q8_0",
    json: JsonOption = False,
) -> None:
    """Turn a Hugging Face folder or hub repository into one GGUF file.

    The file carries the tokenizer, the chat template and the whole configuration. Memory stays small whatever the
    model's size, and a conversion that is stopped leaves no half file.
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.formats.convert import convert
    from hybridlm.store import weights

    if (path := Path(source).expanduser()).is_file() and path.suffix.lower() == ".gguf":
        raise typer.BadParameter(f"{source} is a GGUF file already; hybridlm quantize changes its type",
                                 param_hint="SRC")
    with Stages() as stages:
        folder = weights(source, progress=stages)
        name = None if path.is_dir() else source.partition("@")[0].rpartition("/")[2]
        summary = convert(folder, out, type.lower(), lambda done, total, *_: stages(f"writing {out}", done, total),
                          name=name)
    print_json(summary.to_dict()) if json else show(summary)


def show(summary: Summary) -> None:
    """What was written, in two or three lines."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.types.items(), key=lambda kv: -kv[1]))
    print(f"{summary.path}: {size(summary.nbytes)}, {summary.parameters:,} parameters, "
          f"{summary.bits_per_weight:.2f} bits a weight ({kinds} tensors)")
    if summary.fallbacks:
        kind = sorted(set(summary.fallbacks.values()))
        print(f"{len(summary.fallbacks)} tensors have rows that do not fit {summary.type} and are {', '.join(kind)}")
    if not summary.has_tokenizer:
        print("no tokenizer.json was there, so the file takes and gives token ids only")
    elif not summary.has_chat_template:
        print("no chat template was there, so the file continues text and does not chat")
