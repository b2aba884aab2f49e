"""Recipes by name. A recipe is a function without arguments that returns a `Recipe`; read one, copy it, change it.

Besides these names, `FILE.py` works: the function `recipe` of that file is called.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from hybridlm.errors import ConfigError
from hybridlm.train.recipe import Recipe
from hybridlm.train.recipes.hybridlm_tiny import hybridlm_tiny
from hybridlm.train.recipes.ladder import RUNGS, ladder
from hybridlm.train.recipes.tiny import tiny

__all__ = ["RECIPES", "find"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "hybridlm-tiny": hybridlm_tiny,
    **{name: partial(ladder, name) for rung in RUNGS for name in (rung, f"{rung}-twin")},
}


def find(name: str) -> Recipe:
    """The recipe of a name in `RECIPES` or of a Python file."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ConfigError(f"{name}: no such recipe file")
        function = runpy.run_path(name).get("recipe")
        if not callable(function):
            raise ConfigError(f"{name}: defines no function recipe() that returns a Recipe")
    elif name in RECIPES:
        function = RECIPES[name]
    else:
        raise ConfigError(f"recipe {name!r} is unknown; known are {', '.join(RECIPES)}, or FILE.py")
    recipe = function()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{name}: recipe() returned {type(recipe).__name__}, not a Recipe")
    return replace(recipe, name=name)
