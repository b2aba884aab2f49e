"""Whether the ranks that should hold the same bits do: a flipped bit is found before a checkpoint is marked good.

Every rank adds up the bits of each tensor it holds as whole numbers, which any single flipped bit changes; the sums of
ranks that hold the same piece are compared. Of three replicas or more the odd one is named; two that differ only show
that something is wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridlm.errors import HybridLMError
from hybridlm.train.state import local

__all__ = ["ReplicaError", "Replicas", "bit_sums", "odd_ones"]

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(HybridLMError):
    """Ranks that should hold the same weights do not; `ranks` are those known to be wrong, none if it is undecided."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class Replicas:
    """Compares what replicas hold; one object lives as long as the process group does."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._pieces: list[tuple[str, ...]] = []  # for each rank, which piece of each tensor it holds

    def check(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Raise `ReplicaError` on every rank unless all replicas agree. Collective; does nothing with one rank."""
        if self._group is None:
            return
        names = list(tensors)
        world = dist.get_world_size(self._group)
        own = bit_sums(tensors)
        if len(self._pieces) != world or len(self._pieces[0]) != len(names):
            gathered: list[tuple[str, ...]] = [()] * world
            dist.all_gather_object(gathered, tuple(_piece(t) for t in tensors.values()), group=self._group)
            self._pieces = gathered
        sums = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(sums, own, group=self._group)
        wrong, differing = odd_ones([s.tolist() for s in sums], self._pieces, names)
        if not differing:
            return
        first = f"{differing[0]} and {len(differing) - 1} more" if len(differing) > 1 else differing[0]
        who = f"rank {', '.join(map(str, wrong))} holds other bits than its replicas" if wrong else \
            "replicas differ, and there are too few to tell which one is wrong"
        raise ReplicaError(f"{what}: {who} ({first}); it is not marked good, training goes back to the checkpoint "
                           f"before it. A machine that shows this twice should be taken out", tuple(wrong))


def bit_sums(tensors: Mapping[str, Tensor]) -> Tensor:
    """int64 [number of tensors] on the CPU: the sum of each local tensor's elements, read as whole numbers."""
    sums = []
    for tensor in tensors.values():
        part = local(tensor).detach().contiguous()
        sums.append(part.view(_WHOLE[part.element_size()]).sum(dtype=torch.int64))
    return torch.stack([s.to("cpu", non_blocking=True) for s in sums]) if len({s.device for s in sums}) > 1 else \
        torch.stack(sums).cpu()


def odd_ones(sums: list[list[int]], pieces: list[tuple[str, ...]], names: list[str]) -> tuple[list[int], list[str]]:
    """(ranks whose bits differ from the majority of their replicas, names of the tensors that differ anywhere).

    sums, pieces: one row a rank, one column a tensor; ranks with the same piece of a tensor are its replicas.
    """
    wrong: set[int] = set()
    differing: list[str] = []
    for column, name in enumerate(names):
        replicas: dict[str, list[int]] = defaultdict(list)
        for rank, row in enumerate(pieces):
            replicas[row[column]].append(rank)
        for ranks in replicas.values():
            counts = Counter(sums[r][column] for r in ranks)
            if len(counts) == 1:
                continue
            if not differing or differing[-1] != name:
                differing.append(name)
            value, votes = counts.most_common(1)[0]
            if 2 * votes > len(ranks):
                wrong |= {r for r in ranks if sums[r][column] != value}
    return sorted(wrong), differing


def _piece(tensor: Tensor) -> str:
    """Which piece of the whole a rank holds: "" for all of it."""
    if not isinstance(tensor, DTensor):
        return ""
    where = tensor.device_mesh.get_coordinate() or ()
    return ",".join(f"{p}@{c}" for p, c in zip(tensor.placements, where, strict=False) if not p.is_replicate())
