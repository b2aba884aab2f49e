"""`hybridlm upload FILE... OWNER/NAME`: publish GGUF files with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hybridlm.cli._common import note


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="GGUF files of one model, of one type or "
                                                                        "several.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub; it is made if "
                                                                         "need be.")],
    license: Annotated[str | None, typer.Option("--license", help="Of the weights, as the hub names it: "
                                                                  "apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option("--base-model", metavar="OWNER/NAME", help="What the files were "
                                                   "made from.")] = None,
    card: Annotated[Path | None, typer.Option("--card", help="A model card of your own (Markdown) instead of the one "
                                                             "that is written from the files.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository that only its owner sees.")] = False,
    replace_card: Annotated[bool, typer.Option("--replace-card", help="Write the card anew although the repository has "
                                                                      "one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and send nothing.")] = False,
) -> None:
    """Publish GGUF files and a model card to the Hugging Face hub. Log in first: hf auth login, or HF_TOKEN.

    hybridlm upload model-q4_m.gguf model-q8_0.gguf me/Model-GGUF --license apache-2.0
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.errors import HybridLMError
    from hybridlm.store import upload

    try:
        own = card.read_text(encoding="utf-8") if card else None
    except (OSError, UnicodeDecodeError) as error:
        raise HybridLMError(f"{card}: cannot be read ({error})") from None
    with Stages() as stages:
        read = [upload.read(path, stages) for path in files]
        text = own or upload.card(repository, read, license, base_model)
        if dry_run:
            print(text)
            return
        explicit = own is not None or replace_card or license is not None or base_model is not None
        address = upload.publish(read, repository, text=text if explicit else None, private=private, report=stages)
    note(f"Published. Anybody can now run: hybridlm pull {repository}")
    print(address)
