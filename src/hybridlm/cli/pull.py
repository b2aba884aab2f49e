"""`hybridlm pull MODEL`: fetch a model now, so that it opens at once later."""

from __future__ import annotations

from typing import Annotated

import typer

from hybridlm.cli._common import ModelArgument, note, size


def command(
    model: ModelArgument,
    type: Annotated[str | None, typer.Option("--type", help="Of the weights: q8_0, q4_m, ...; what fits the model's "
                                                            "size when left out.")] = None,
    alias: Annotated[str | None, typer.Option("--as", metavar="NAME", help="A short name for it from now on.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Ask the hub whether there is a newer one.")] = False,
) -> None:
    """Fetch a model from the hub, check it against the hub's hashes, and convert it where that is needed.

    hybridlm pull allenai/Olmo-Hybrid-7B --as olmo
    """
    from hybridlm.cli._progress import Stages
    from hybridlm.store import resolve
    from hybridlm.store.catalogue import set_alias

    with Stages() as stages:
        path = resolve(model, type=type, progress=stages, update=update)
    if alias:
        set_alias(alias, f"{model}:{type}" if type and ":" not in model else model)
    note(f"{alias or model} is ready: {size(path.stat().st_size)}")
    print(path)
