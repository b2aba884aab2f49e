"""How the ranks of a run are numbered: replicate x shard x context x tensor, the last running fastest."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridlm.errors import ConfigError

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Ranks in each direction. Rows of the batch are divided over replicate x shard, tokens of a row over context x
    tensor; weights, gradients and moments over all but `replicate`, unless only `replicate` and `context` are used.

    replicate: 0 takes what is left of the world.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    context: int = 1

    def of(self, world: int) -> Layout:
        """The layout with all four numbers known. Raises `ConfigError` when they do not make up the world."""
        inner = self.shard * self.context * self.tensor
        if min(self.shard, self.context, self.tensor) < 1 or self.replicate < 0:
            raise ConfigError("dp_shard, cp and tp count ranks and are at least 1; dp_replicate may be 0")
        known = replace(self, replicate=self.replicate or max(world // inner, 1))
        if known.replicate * inner != world:
            raise ConfigError(f"dp_replicate x dp_shard x cp x tp = {known.replicate} x {self.shard} x {self.context} "
                              f"x {self.tensor} does not make {world} processes; start so many, or give dp_replicate=0 "
                              "and a product that divides them")
        return known

    @property
    def sharded(self) -> bool:
        """Whether weights are divided over ranks."""
        return self.shard > 1 or self.tensor > 1
