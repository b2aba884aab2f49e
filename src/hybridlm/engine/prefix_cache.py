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

On disk each block is written once, and every part has its own checksum. What is damaged, or from another model, is
not loaded; that costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybridlm.atomic import atomic_write

__all__ = ["Checkpoint", "PrefixCache", "Stats"]

_MAGIC, _VERSION = b"hlmcache", 2
_PREFIX = struct.Struct("<8sIQ32s")  # magic, version, bytes of the index, sha256 of the index
_MAX_INDEX = 1 << 30
_LOOK = 512  # checkpoints looked at for one to evict, of more a sample: thousands would take longer than it saves
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


class _Node:
    """A place in the tree: the tokens from its parent's place to its own, and perhaps a checkpoint."""

    __slots__ = ("children", "clock", "depth", "edge", "entry", "parent", "used", "uses")

    def __init__(self, parent: _Node | None, edge: np.ndarray) -> None:
        self.parent, self.edge = parent, edge
        self.depth: int = len(edge) + (parent.depth if parent else 0)
        self.children: dict[int, _Node] = {}
        self.entry: Any = None
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
            path, best = self._walk(np.asarray(tokens, dtype=np.int32)), None
            for node, matched in path:
                if node.entry is not None and matched == len(node.edge):
                    best = node
            self.stats.lookups += 1
            self.stats.asked_tokens += len(tokens)
            if best is None:
                return None
            self.stats.hits += 1
            self.stats.reused_tokens += best.depth
            self._touch(best)
            return best.entry

    def covered(self, tokens: Sequence[int]) -> int:
        """How many tokens `find` would save; changes nothing."""
        with self._lock:
            return max((node.depth for node, matched in self._walk(np.asarray(tokens, dtype=np.int32))
                        if node.entry is not None and matched == len(node.edge)), default=0)

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
            node.entry = checkpoint
            self._nodes.add(node)
            self._touch(node)
            self._nbytes += checkpoint.own_nbytes
            for block in checkpoint.blocks():
                held = self._blocks.setdefault(id(block), [block, 0])
                held[1] += 1
                if held[1] == 1:
                    self._nbytes += block.nbytes
            self.stats.stored += 1
            self._shrink(keep=node)
            return True

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            for node in list(self._nodes):
                self._remove(node)

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
        entry, node.entry, node.uses = node.entry, None, 0
        self._nodes.discard(node)
        self._nbytes -= entry.own_nbytes
        for block in entry.blocks():
            held = self._blocks[id(block)]
            held[1] -= 1
            if not held[1]:
                del self._blocks[id(block)]
                self._nbytes -= block.nbytes
        while node.entry is None and node.parent is not None and len(node.children) < 2:
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
            self._remove(node)
            self.stats.evicted += 1

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, fingerprint: str) -> None:
        """Write all checkpoints into one file, whole or not at all; `fingerprint` says to which model they belong."""
        with self._lock:
            entries = list(self)
        parts: list[Callable[[], Sequence[Any]]] = []  # each gives the buffers it consists of
        numbers: dict[int, int] = {}
        index: list[dict[str, Any]] = []
        for entry in entries:
            blocks = []
            for block in entry.blocks():
                if id(block) not in numbers:
                    numbers[id(block)] = len(parts)
                    parts.append(functools.partial(_buffers, entry, block))
                blocks.append(numbers[id(block)])
            index.append({"tokens": [int(t) for t in entry.tokens], "blocks": blocks, "own": len(parts)})
            parts.append(entry.own_parts)

        with atomic_write(path) as file:
            file.write(bytes(_PREFIX.size))
            table: list[tuple[int, int, str]] = []
            for part in parts:
                digest, offset = hashlib.sha256(), file.tell()
                for buffer in part():
                    digest.update(buffer)
                    file.write(buffer)
                table.append((offset, file.tell() - offset, digest.hexdigest()))
            body = json.dumps({"fingerprint": fingerprint, "entries": index, "parts": table},
                              separators=(",", ":")).encode()
            file.write(body)
            file.seek(0)
            file.write(_PREFIX.pack(_MAGIC, _VERSION, len(body), hashlib.sha256(body).digest()))

    def load(self, path: str | Path, fingerprint: str, block: Callable[[bytes], Any],
             rebuild: Callable[[list[int], bytes, list[Any]], Any]) -> int:
        """Add the checkpoints of a saved file, the most recently useful ones where not all fit; returns how many.

        `block(data)` makes a shared block, `rebuild(tokens, own, blocks)` a checkpoint; either raises ValueError for
        data that cannot be one. A file that is missing, damaged or of another model gives what is sound in it, down
        to nothing.
        """
        loaded: list[Any] = []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError), \
                Path(path).open("rb") as file:
            magic, version, size, digest = _PREFIX.unpack(file.read(_PREFIX.size).ljust(_PREFIX.size))
            end = file.seek(0, os.SEEK_END)
            if magic != _MAGIC or version != _VERSION or size > min(end, _MAX_INDEX):
                return 0
            file.seek(end - size)
            body = file.read(size)
            if hashlib.sha256(body).digest() != digest:
                return 0
            index = json.loads(body)
            if index["fingerprint"] != fingerprint:
                return 0
            loaded = self._load_entries(file, end, index, block, rebuild)
        return sum(self.put(entry) for entry in reversed(loaded))

    def _load_entries(self, file: Any, end: int, index: dict[str, Any], block: Callable[[bytes], Any],
                      rebuild: Callable[[list[int], bytes, list[Any]], Any]) -> list[Any]:
        """Sound entries, the most recently useful first, up to the budget."""

        def read(number: int) -> bytes:
            offset, size, digest = index["parts"][number]
            if not 0 <= offset <= offset + size <= end:
                raise ValueError
            file.seek(offset)
            data: bytes = file.read(size)
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                raise ValueError
            return data

        loaded: list[Any] = []
        made: dict[int, Any] = {}
        room = self.budget - self._nbytes
        for entry in reversed(index["entries"]):
            missing = [n for n in dict.fromkeys(entry["blocks"]) if n not in made]
            room -= sum(index["parts"][n][1] for n in [*missing, entry["own"]])
            if room < 0 and loaded:
                break
            with contextlib.suppress(ValueError):
                made.update({n: block(read(n)) for n in missing})
                loaded.append(rebuild(entry["tokens"], read(entry["own"]), [made[n] for n in entry["blocks"]]))
        return loaded


def _buffers(entry: Any, block: Any) -> Sequence[Any]:
    return [entry.block_bytes(block)]
