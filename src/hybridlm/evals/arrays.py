"""A batch of a synthetic task."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Batch"]


@dataclass(frozen=True, slots=True)
class Batch:
    """`targets[i, t]` is what a model should say after reading `inputs[i, :t + 1]`, where `mask[i, t]` is set."""

    inputs: np.ndarray  # int32 [n, T]
    targets: np.ndarray  # int32 [n, T]; 0 where the mask is not set
    mask: np.ndarray  # bool [n, T]
    subsets: dict[str, np.ndarray] = field(default_factory=dict)  # bool [n] each
