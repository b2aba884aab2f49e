"""A training in stages, each from the last one's checkpoint; a stage of several seeds ends in the mean of its runs.

    OUT/pretrain/                      a run as `hybridlm train` leaves it
    OUT/midtrain-1337/, midtrain-683/  a run for each seed
    OUT/midtrain/                      their soup: a model folder
    OUT/long/

Started again, finished stages are passed by and the one that was interrupted goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hybridlm.errors import ConfigError
from hybridlm.train.soup import soup

__all__ = ["Stage", "run_stages"]


@dataclass(frozen=True)
class Stage:
    """One stage: the recipe it starts from, what it changes, and with which seeds it is run."""

    name: str
    recipe: str
    settings: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()  # none: one run with the recipe's seed


def run_stages(stages: list[Stage], settings: Mapping[str, str], run: Callable[[str, Mapping[str, str]], Path]) -> Path:
    """Run all stages in order; returns the folder of the last.

    Args:
        settings: `KEY` goes to all stages, `STAGE.KEY` to one; `out` is the folder of the whole.
        run: `hybridlm.train.run`.
    """
    if not settings.get("out"):
        raise ConfigError("out: missing; give out=DIR, the folder of all stages")
    names = [stage.name for stage in stages]
    common = {k: v for k, v in settings.items() if k != "out" and k.partition(".")[0] not in names}
    out, last = Path(settings["out"]), ""
    for stage in stages:
        own = {k.partition(".")[2]: v for k, v in settings.items() if k.partition(".")[0] == stage.name}
        changes = {**common, **stage.settings, **own}
        if last:
            changes.setdefault("init", last)
            changes.setdefault("tokenizer", str(out / _first(stages[0]) / "tokenizer"))
        runs = []
        for seed in stage.seeds or (None,):
            folder = out / (stage.name if seed is None else f"{stage.name}-{seed}")
            seeded = {} if seed is None else {"seed": str(seed)}
            runs.append(folder)
            if (folder / "result.json").exists():
                _say(f"{stage.name}: done before, {folder}")
                continue
            _say(f"stage {folder.name}")
            run(stage.recipe, {**changes, **seeded, "out": str(folder)})
        last = str(runs[0])
        if len(runs) > 1:
            last = str(out / stage.name)
            if not (out / stage.name / "config.json").exists() and os.environ.get("RANK", "0") == "0":
                soup(runs, last)
    return Path(last)


def _first(stage: Stage) -> str:
    return f"{stage.name}-{stage.seeds[0]}" if stage.seeds else stage.name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
