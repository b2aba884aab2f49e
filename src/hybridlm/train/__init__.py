"""Training: recipes, the loop, checkpoints, metrics. `run("tiny", {"data": PATH, "out": DIR})` is `hybridlm train`."""

from hybridlm.train.recipe import Recipe
from hybridlm.train.run import run
from hybridlm.train.trainer import Trainer

__all__ = ["Recipe", "Trainer", "run"]
