"""What the plan takes from the world: GPUs' data sheets, and how fast this package was measured to train on one.

Every number here is printed with the plan that used it.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridlm.config import HybridConfig
from hybridlm.errors import ConfigError

__all__ = ["GPU", "GPUS", "find_gpu", "measured_mfu"]

PER_NODE = 8  # GPUs that one NVLink joins


@dataclass(frozen=True)
class GPU:
    """A data sheet: dense bfloat16 FLOP/s, bytes of memory, bytes/s each way over NVLink and over its network card."""

    name: str
    peak: float
    memory: float
    nvlink: float
    network: float = 50e9  # 400 Gbit/s a GPU


GPUS = {
    "a100": GPU("A100 80GB", 312e12, 80e9, 300e9, 25e9),
    "h100": GPU("H100 80GB", 989e12, 80e9, 450e9),
    "h200": GPU("H200 141GB", 989e12, 141e9, 450e9),
    "b200": GPU("B200 180GB", 2250e12, 180e9, 900e9),
}

# (at least so many weights outside the tables, one sequence a step or more, share of the peak): the training steps of
# docs/performance-gpu.md, one H200, sequences of 8,192, bfloat16, blocks compiled.
_MEASURED = (
    (700e6, False, 0.423, "the 1b, 1 x 8,192 tokens a step"),
    (700e6, True, 0.458, "the 1b, 16 x 8,192 tokens a step"),
    (0, False, 0.286, "the 190m, 2 x 8,192 tokens a step"),
    (0, True, 0.389, "the 190m, 16 x 8,192 tokens a step"),
)


def find_gpu(name: str) -> GPU:
    """A GPU by its word. Raises `ConfigError` for one that is not in the table."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(f"gpu: {name!r} is unknown; known are {', '.join(GPUS)}") from None


def measured_mfu(config: HybridConfig, sequences: float) -> tuple[float, str]:
    """The measured share of the peak nearest to a model at `sequences` a GPU and step, and what was measured."""
    weights = config.num_parameters(embedding=False)
    for least, several, share, what in _MEASURED:
        if weights >= least and several == (sequences > 1):
            return share, f"{share:.1%}, measured on one H200: {what} (docs/performance-gpu.md)"
    raise AssertionError
