"""Continuations of given contexts, with whatever contexts share read once.

Benchmarks ask for the log-likelihood of many short continuations after long contexts that begin alike: a subject's
worked examples, then the question, then each choice. The texts form a tree over their tokens. It is walked depth
first, several branches side by side: each goes on from a copy of its parent's state (full pages of keys and values are
shared, see `state.py`), and every pass reads the weights once for all branches in it. The head is computed only for the
rows that predict a token of a continuation, once however many continuations look at the row: four one-letter answers to
a question cost one reading of the question and one row of the head.

Given the same requests the passes are the same, so results are equal to the last bit however often it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from hybridlm.engine.passes import HEAD_ROWS, SCORE_BYTES, SLAB, Passes
from hybridlm.engine.walk import logits

__all__ = ["Request", "continuations"]

Request = tuple[np.ndarray, np.ndarray]  # context and continuation, int32, both with at least one token

_WORTH = 8  # shared tokens that pay for copying a state
_ROWS = 4 * SLAB  # tokens that branches side by side may have together


@dataclass(slots=True)
class _Node:
    """Tokens read after those of the parent."""

    tokens: np.ndarray
    cells: list[tuple[int, int, int]] = field(default_factory=list)  # row, request, the token that it asks for
    children: list[_Node] = field(default_factory=list)


def continuations(passes: Passes, requests: Sequence[Request], start: Any = None) -> list[tuple[float, bool]]:
    """Of each request the log-probability of its continuation after its context, and whether greedy decoding would
    have written it. `start`: a state that has read the first tokens of every context (not all of any); it is copied."""
    logprobs = np.zeros(len(requests), np.float64)
    greedy = np.ones(len(requests), bool)

    def visit(nodes: Sequence[tuple[_Node, Any]]) -> None:
        for group in _groups(nodes, passes):
            states = [passes.ops.state() if parent is None else parent.clone() for _, parent in group]
            read([node for node, _ in group], states)
            below = [(child, state) for (node, _), state in zip(group, states, strict=True) for child in node.children]
            del states
            visit(below)

    def read(nodes: list[_Node], states: list[Any]) -> None:
        parts = [(state, node.tokens) for node, state in zip(nodes, states, strict=True)]
        with passes.lock:
            for slices, hidden in passes._run(parts, False):
                first, cells = 0, []
                for p, a, b in slices:
                    cells += [(first + row - a, request, token) for row, request, token in nodes[p].cells
                              if a <= row < b]
                    first += b - a
                look(hidden, cells)

    def look(hidden: Any, cells: list[tuple[int, int, int]]) -> None:
        rows = sorted({row for row, _, _ in cells})
        wanted: dict[int, list[tuple[int, int]]] = {}
        for row, request, token in cells:
            wanted.setdefault(row, []).append((request, token))
        for i in range(0, len(rows), HEAD_ROWS):
            x = logits(passes.weights, passes.ops, hidden[rows[i:i + HEAD_ROWS]])
            best = x.argmax(axis=-1)
            x -= x.max(axis=-1, keepdims=True)
            chosen = [[(request, token, x[n, token]) for request, token in wanted[row]]
                      for n, row in enumerate(rows[i:i + HEAD_ROWS])]
            np.exp(x, out=x)
            total = np.log(x.sum(axis=-1, dtype=np.float64))
            for n, entries in enumerate(chosen):
                for request, token, value in entries:
                    logprobs[request] += float(value) - float(total[n])
                    greedy[request] &= bool(best[n] == token)

    visit([(node, start) for node in _tree(requests, 0 if start is None else start.position)])
    return [(float(p), bool(g)) for p, g in zip(logprobs, greedy, strict=True)]


def _tree(requests: Sequence[Request], skip: int) -> list[_Node]:
    """The branches of what is to be read after the first `skip` tokens, which all share."""
    texts: dict[bytes, tuple[np.ndarray, list[int]]] = {}
    for number, (context, continuation) in enumerate(requests):
        text = np.concatenate([context, continuation[:-1]]).astype(np.int32)
        texts.setdefault(text.astype(">i4").tobytes(), (text, []))[1].append(number)  # bytes that sort as numbers do
    order = [texts[key] for key in sorted(texts)]
    shared = [_common(a, b) for (a, _), (b, _) in pairwise(order)]

    def cells(node: _Node, first: int, last: int, depth: int) -> None:
        end = depth + len(node.tokens)
        for _, numbers in order[first:last]:
            for number in numbers:
                context, continuation = requests[number]
                begin = len(context) - 1  # the row that predicts the continuation's first token
                for row in range(max(begin, depth), min(begin + len(continuation), end)):
                    node.cells.append((row - depth, number, int(continuation[row - begin])))

    def branches(first: int, last: int, depth: int) -> list[_Node]:
        found, at = [], first
        while at < last:
            to = at + 1
            while to < last and shared[to - 1] >= depth + _WORTH:
                to += 1
            text = order[at][0]
            end = min(shared[at:to - 1], default=len(text))
            if end > depth:
                node = _Node(text[depth:end])
                cells(node, at, to, depth)
                if to - at > 1:
                    node.children = branches(at, to, end)
                found.append(node)
            at = to
        return found

    return branches(0, len(order), skip)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts begin with in common."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _groups(nodes: Sequence[tuple[_Node, Any]], passes: Passes) -> list[list[tuple[_Node, Any]]]:
    """Nodes to read side by side, in order: as many as fit `_ROWS` tokens and `SCORE_BYTES` of states."""
    groups: list[list[tuple[_Node, Any]]] = []
    tokens, size = 0, 0
    for node, parent in nodes:
        size = size or (passes.ops.state() if parent is None else parent).own_nbytes
        if not groups or tokens + len(node.tokens) > _ROWS or (len(groups[-1]) + 1) * size > SCORE_BYTES:
            groups.append([])
            tokens = 0
        groups[-1].append((node, parent))
        tokens += len(node.tokens)
    return groups
