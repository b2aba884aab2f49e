"""Recipes by name. A recipe is a function without arguments that returns a `Recipe`; read one, copy it, change it.

Besides these names, `FILE.py` works: the function `recipe` of that file is called, or its function `stages`, which
returns a list of `Stage`s.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hybridlm.errors import ConfigError
from hybridlm.train.provenance import read_recipe
from hybridlm.train.recipe import Recipe
from hybridlm.train.recipes.hybridlm_tiny import hybridlm_tiny
from hybridlm.train.recipes.ladder import RUNGS, ladder
from hybridlm.train.recipes.olmo_hybrid import olmo_hybrid, olmo_hybrid_7b
from hybridlm.train.recipes.tiny import tiny
from hybridlm.train.stages import Stage

__all__ = ["RECIPES", "STAGED", "find", "stages_of"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "hybridlm-tiny": hybridlm_tiny,
    **{name: partial(ladder, name) for rung in RUNGS for name in (rung, f"{rung}-twin")},
    "7b": olmo_hybrid_7b,
}
STAGED: dict[str, Callable[[], list[Stage]]] = {"olmo-hybrid": olmo_hybrid}


def find(name: str) -> Recipe:
    """The recipe of a name in `RECIPES`, of a Python file, or of a run's folder."""
    if (Path(name) / "recipe.json").is_file():
        return read_recipe(Path(name))
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such recipe file")
        function = runpy.run_path(name).get("recipe")
        if not callable(function):
            raise ConfigError(f"{name}: defines no function recipe() that returns a Recipe")
    elif name in RECIPES:
        function = RECIPES[name]
    else:
        raise ConfigError(f"recipe {name!r} is unknown; known are {', '.join([*RECIPES, *STAGED])}, FILE.py "
                          "or a run's folder")
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{name}: recipe() returned {type(recipe).__name__}, not a Recipe")
    return replace(recipe, name=name)


def stages_of(name: str) -> list[Stage]:
    """The stages of a name in `STAGED` or of a Python file with a function `stages`; none: it is a single recipe."""
    if name in STAGED:
        return STAGED[name]()
    function = runpy.run_path(name).get("stages") if name.endswith(".py") and Path(name).is_file() else None
    stages = function() if callable(function) else []
    if not all(isinstance(stage, Stage) for stage in stages):
        raise ConfigError(f"{name}: stages() must return a list of Stage")
    return list(stages)
