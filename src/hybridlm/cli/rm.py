"""`hybridlm rm NAME...`: delete models from the store."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridlm.cli._common import note, size


def command(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As hybridlm list tells them. OWNER/NAME alone "
                                               "deletes all that was fetched of it; an alias only the alias.")],
) -> None:
    """Delete models that were fetched or converted. Files outside the store are never touched.

    hybridlm rm allenai/Olmo-Hybrid-7B:q4_m
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.store.catalogue import remove

    for name in names:
        with Stages() as stages:
            freed = remove(name, stages)
        note(f"{name}: deleted, {size(freed)} are free now")
