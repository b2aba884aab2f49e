"""The prefix cache: model states kept by the tokens they have read, so that no prompt is read twice.

A recurrent state cannot be shortened, so reuse needs *checkpoints*: states kept at positions where later prompts may
part ways (the end of a turn, every so many tokens). They hang in a radix tree over tokens; `find` walks a new prompt
down the tree and gives the deepest checkpoint it passes.

A checkpoint holds a part of its own and blocks (full KV pages) that it shares with others; the budget counts each
block once. When it is exceeded, the checkpoint goes that is worth least, by GreedyDual-Size-Frequency (Cherkasova,
1998): uses x cost / size above the worth that the last evicted one had when this one was last used. The cost is the
tokens that would have to be read again, back to the nearest checkpoint above; the size the bytes of its own part. So
old ones go first, and dense ones before sparse ones: a long prompt thins out evenly.

The cache knows nothing about devices. Whatever an engine stores has the members of `Checkpoint`; nothing here looks
inside, changes or copies one, and who takes one out must clone it before going on from it.

A second tier on a disk (`keep_on_disk`, `disk_tier.py`) takes what is evicted, and at `flush` what is not yet there;
its checkpoints have their places in the same tree and come back when a prompt passes them, after a restart too.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from hybridlm.engine.disk_tier import DiskTier, Stored

__all__ = ["Checkpoint", "PrefixCache", "Stats"]

_LOOK = 512  # checkpoints looked at for one to evict, of more a sample: thousands would take longer than it saves
_SPILLING = 2  # evicted checkpoints on their way to the disk; more are let go, as memory is for those in use
_WORTH_READING = 32  # tokens that a checkpoint on the disk must save over one in memory
_MOST_USES = 8  # counted for worth, so that yesterday's favourite does not stay for ever


class Checkpoint(Protocol):
    """What the cache needs of a state."""

    @property
    def tokens(self) -> Sequence[int]:
        """What it has read."""

    @property
    def own_nbytes(self) -> int:
        """Bytes that only it holds."""

    def blocks(self) -> Sequence[Any]:
        """Immutable buffers with `nbytes` that it may share; the same object is the same memory."""

    def own_parts(self) -> Sequence[Any]:
        """Buffers of all but the blocks, for the disk."""

    def block_bytes(self, block: Any) -> Any:
        """A block as a buffer, for the disk."""


@dataclass(slots=True)
class Stats:
    """Counted since the cache was made."""

    lookups: int = 0
    hits: int = 0
    asked_tokens: int = 0
    reused_tokens: int = 0
    stored: int = 0
    evicted: int = 0
    spilled: int = 0  # written to the disk
    reloaded: int = 0  # read from there
    lost: int = 0  # found damaged there, or not to be written


class _Node:
    """A place in the tree: the tokens from its parent's place to its own, and perhaps a checkpoint, in memory or on the
    disk or both."""

    __slots__ = ("children", "clock", "depth", "edge", "entry", "parent", "stored", "used", "uses")

    def __init__(self, parent: _Node | None, edge: np.ndarray) -> None:
        self.parent, self.edge = parent, edge
        self.depth: int = len(edge) + (parent.depth if parent else 0)
        self.children: dict[int, _Node] = {}
        self.entry: Any = None
        self.stored: Stored | None = None
        self.uses = 0  # its making counts
        self.clock = 0.0  # of GreedyDual, when it was last of use
        self.used = 0  # a serial number of that use, to settle ties


class PrefixCache:
    """Checkpoints under a budget in bytes. Safe to use from several threads."""

    def __init__(self, budget: int) -> None:
        """`budget` 0 keeps nothing."""
        self.budget = budget
        self.stats = Stats()
        self._root = _Node(None, np.empty(0, np.int32))
        self._nodes: set[_Node] = set()  # those with an entry
        self._blocks: dict[int, list[Any]] = {}  # id -> [block, checkpoints that hold it]
        self._nbytes = 0
        self._clock = 0.0
        self._serial = itertools.count(1)
        self._random = random.Random(0)
        self._lock = threading.RLock()
        self.disk: DiskTier | None = None
        self._writing = threading.Lock()  # one writes to the disk at a time
        self._spilling: queue.Queue[Any] = queue.Queue(_SPILLING)
        self._spiller: threading.Thread | None = None

    # -- use -----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held, each shared block counted once; the tree itself, a few bytes a token, is not counted."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Any]:
        """The checkpoints, the least recently useful first."""
        with self._lock:
            return iter([node.entry for node in sorted(self._nodes, key=lambda node: node.used)])

    def find(self, tokens: Sequence[int]) -> Any | None:
        """The checkpoint that has read the longest prefix of `tokens` (perhaps all), or None. Clone it before use."""
        with self._lock:
            self.stats.lookups += 1
            self.stats.asked_tokens += len(tokens)
            best = self._best(np.asarray(tokens, dtype=np.int32))
            if best is None:
                return None
            self.stats.hits += 1
            self.stats.reused_tokens += best.depth
            self._touch(best)
            if best.stored is not None and self.disk is not None:
                self.disk.use(best.stored)
            return best.entry

    def covered(self, tokens: Sequence[int]) -> int:
        """How many tokens `find` would save; changes nothing."""
        with self._lock:
            memory, disk = self._along(np.asarray(tokens, dtype=np.int32))
            near = memory.depth if memory else 0
            return disk[-1].depth if disk and disk[-1].depth - near >= _WORTH_READING else near

    def put(self, checkpoint: Any) -> bool:
        """Keep a checkpoint, which from now on must not change. False where one with the same tokens is there already
        (that one counts as used).

        The newest one stays even if it alone exceeds the budget: until now a sequence held its memory anyway, and the
        next turn of a very long conversation needs it.
        """
        tokens = np.array(checkpoint.tokens, dtype=np.int32)
        with self._lock:
            if not len(tokens) or not self.budget:
                return False
            node = self._place(tokens)
            if node.entry is not None:
                self._touch(node)
                return False
            self._hold(node, checkpoint)
            self.stats.stored += 1
            return True

    def clear(self) -> None:
        """Forget everything that is in memory."""
        with self._lock:
            for node in list(self._nodes):
                self._remove(node)

    def _hold(self, node: _Node, checkpoint: Any) -> None:
        node.entry = checkpoint
        self._nodes.add(node)
        self._touch(node)
        self._nbytes += checkpoint.own_nbytes
        for block in checkpoint.blocks():
            held = self._blocks.setdefault(id(block), [block, 0])
            held[1] += 1
            if held[1] == 1:
                self._nbytes += block.nbytes
        self._shrink(keep=node)

    def _along(self, tokens: np.ndarray) -> tuple[_Node | None, list[_Node]]:
        """The deepest node along `tokens` with a checkpoint in memory, and those below it with one on the disk."""
        memory: _Node | None = None
        disk: list[_Node] = []
        for node, matched in self._walk(tokens):
            if matched < len(node.edge):
                break
            if node.entry is not None:
                memory, disk = node, []
            elif node.stored is not None:
                disk.append(node)
        return memory, disk

    def _best(self, tokens: np.ndarray) -> _Node | None:
        """The deepest node along `tokens` whose checkpoint can be had, now in memory."""
        memory, disk = self._along(tokens)
        while disk and disk[-1].depth - (memory.depth if memory else 0) >= _WORTH_READING:
            node = disk.pop()
            stored = node.stored
            assert stored is not None and self.disk is not None
            try:
                entry = self.disk.read(stored)
            except (OSError, ValueError):
                self.stats.lost += 1
                self._unstore([stored])
                continue
            self.stats.reloaded += 1
            self._hold(node, entry)
            return node
        return memory

    # -- tree ----------------------------------------------------------------------------------------------------

    def _walk(self, tokens: np.ndarray) -> list[tuple[_Node, int]]:
        """Nodes along `tokens`, below the root, each with how much of its edge agrees; all but the last agree whole."""
        path: list[tuple[_Node, int]] = []
        node = self._root
        while node.depth < len(tokens):
            child = node.children.get(int(tokens[node.depth]))
            if child is None:
                break
            rest = tokens[node.depth:child.depth]
            differs = np.flatnonzero(rest != child.edge[:len(rest)])
            matched = int(differs[0]) if len(differs) else len(rest)
            path.append((child, matched))
            if matched < len(child.edge):
                break
            node = child
        return path

    def _place(self, tokens: np.ndarray) -> _Node:
        """The node of exactly these tokens, made if need be."""
        path = self._walk(tokens)
        node = self._root
        if path:
            node, matched = path[-1]
            if matched < len(node.edge):
                node = self._split(node, matched)
        if node.depth < len(tokens):
            node = self._attach(node, tokens[node.depth:].copy())
        return node

    def _attach(self, parent: _Node, edge: np.ndarray) -> _Node:
        node = _Node(parent, edge)
        parent.children[int(edge[0])] = node
        return node

    def _split(self, node: _Node, at: int) -> _Node:
        """A node in the middle of the edge that leads to `node`."""
        assert node.parent is not None
        middle = self._attach(node.parent, node.edge[:at].copy())
        node.parent, node.edge = middle, node.edge[at:].copy()
        middle.children[int(node.edge[0])] = node
        return middle

    def _remove(self, node: _Node) -> None:
        """Drop a node's checkpoint, and what of the tree only led to it."""
        entry, node.entry, node.uses = node.entry, None, 0  # with what may be on the disk it stays a place
        self._nodes.discard(node)
        self._nbytes -= entry.own_nbytes
        for block in entry.blocks():
            held = self._blocks[id(block)]
            held[1] -= 1
            if not held[1]:
                del self._blocks[id(block)]
                self._nbytes -= block.nbytes
        self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Drop what of the tree only led to this node, if it serves nothing."""
        while node.entry is None and node.stored is None and node.parent is not None and len(node.children) < 2:
            parent = node.parent
            if node.children:  # one child: its edge swallows this one
                (child,) = node.children.values()
                child.parent, child.edge = parent, np.concatenate([node.edge, child.edge])
                parent.children[int(child.edge[0])] = child
            else:
                del parent.children[int(node.edge[0])]
            node = parent

    # -- worth ---------------------------------------------------------------------------------------------------

    def _touch(self, node: _Node) -> None:
        node.clock, node.used, node.uses = self._clock, next(self._serial), node.uses + 1

    def _worth(self, node: _Node) -> float:
        above = node.parent
        while above is not None and above.entry is None:
            above = above.parent
        cost = node.depth - (above.depth if above else 0)
        return node.clock + min(node.uses, _MOST_USES) * cost / max(1, node.entry.own_nbytes)

    def _shrink(self, keep: _Node) -> None:
        while self._nbytes > self.budget and len(self._nodes) > 1:
            nodes = self._nodes if len(self._nodes) <= _LOOK else self._random.sample(list(self._nodes), _LOOK)
            worth, _, node = min(((self._worth(n), n.used, n) for n in nodes if n is not keep),
                                 key=lambda item: item[:2])
            self._clock = max(self._clock, worth)
            if self.disk is not None and node.stored is None:
                with contextlib.suppress(queue.Full):
                    self._spilling.put_nowait(node.entry)
            self._remove(node)
            self.stats.evicted += 1

    # -- disk ----------------------------------------------------------------------------------------------------

    def keep_on_disk(self, tier: DiskTier) -> int:
        """From now on evicted checkpoints go there; what it has from earlier can be found. Returns how many it has."""
        with self._lock:
            self.disk = tier
            for stored in tier.scan():
                if len(stored.tokens):
                    self._place(stored.tokens).stored = stored
        self._spiller = threading.Thread(target=self._spill, args=(tier,), name="hybridlm-spill", daemon=True)
        self._spiller.start()
        return len(tier)

    def flush(self) -> int:
        """Write what is in memory only, of the most recently useful as many as the disk's budget can hold; returns how
        many were written."""
        tier, missing = self.disk, []
        seen: set[int] = set()
        if tier is None:
            return 0
        with self._lock:
            room = tier.budget * 4 // 5  # what goes beyond would push out what was written just now
            for node in sorted(self._nodes, key=lambda node: node.used, reverse=True):
                new = {id(block): block.nbytes for block in node.entry.blocks() if id(block) not in seen}
                room -= node.entry.own_nbytes + sum(new.values())
                if room < 0:
                    break
                seen.update(new)
                if node.stored is None:
                    missing.append(node.entry)
        return sum(self._store(tier, entry) for entry in reversed(missing))

    def close(self) -> None:
        """Write what is to be written, forget everything, let go of the folder."""
        self.flush()
        self.clear()
        if self.disk is not None and self._spiller is not None:
            self._spilling.put(None)
            self._spiller.join()
            self.disk.close()
            self.disk = None

    def _spill(self, tier: DiskTier) -> None:
        """The thread that writes what is evicted, so that nobody waits for a disk."""
        while (entry := self._spilling.get()) is not None:
            try:
                self._store(tier, entry)
            except Exception:  # a device that failed, perhaps: what cannot be written is let go, as without a disk
                self.stats.lost += 1
            del entry
            self._spilling.task_done()

    def _store(self, tier: DiskTier, entry: Any) -> bool:
        with self._writing:
            stored = tier.write(entry)
            if stored is None:
                return False
            with self._lock:
                self.stats.spilled += 1
                self._place(stored.tokens).stored = stored
                self._unstore(tier.add(stored))
        return True

    def _unstore(self, gone: Sequence[Stored]) -> None:
        """Checkpoints that are not on the disk any more, or should not be."""
        for stored in gone:
            if self.disk is not None:
                self.disk.drop(stored)
            path = self._walk(stored.tokens)
            if path and path[-1][0].stored is stored:
                path[-1][0].stored = None
                self._prune(path[-1][0])
