"""Training: recipes, the loop, checkpoints, metrics. `run("tiny", {"data": PATH, "out": DIR})` is `hybridlm train`."""

import os

# PyTorch's threads otherwise wait for each other by spinning, which on a machine that has anything else to do makes a
# small model's steps ten times slower. Read when PyTorch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hybridlm.train.recipe import Recipe
from hybridlm.train.run import run
from hybridlm.train.trainer import Trainer

__all__ = ["Recipe", "Trainer", "run"]
