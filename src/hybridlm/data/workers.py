"""Tokenisation in processes of their own, one a core: each gets batches of texts and gives back finished arrays.

The tokenizers library spreads a batch over the cores itself, but what comes after it, lists to arrays and hashes, would
stay on one. The workers are plain programs that talk over pipes, so a caller needs no `if __name__ == "__main__"` and
threads of the parent do not matter, as they would to a fork.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from hybridlm.errors import DataError
from hybridlm.text import Tokenizer

__all__ = ["Encoded", "encode", "encode_all", "serve"]

# Of each text: tokens with the eos in front, UTF-8 bytes, sha256.
Encoded = list[tuple[np.ndarray, int, bytes]]
SERVE = "from hybridlm.data.workers import serve; serve()"


def encode(tokenizer: Tokenizer, texts: list[str], dtype: str) -> Encoded:
    """What the shards need of each text."""
    out = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts, special=False), strict=True):
        raw = text.encode("utf-8", "surrogatepass")
        tokens = np.empty(len(ids) + 1, dtype)
        tokens[0], tokens[1:] = tokenizer.eos, ids
        out.append((tokens, len(raw), hashlib.sha256(raw).digest()))
    return out


def encode_all(tokenizer: Tokenizer, batches: Iterable[tuple[Any, list[str]]], dtype: str,
               workers: int) -> Iterator[tuple[Any, Encoded]]:
    """(key, encoded texts) of each batch in order, by `workers` processes; in this one when there are fewer than 2."""
    if workers < 2:
        for key, texts in batches:
            yield key, encode(tokenizer, texts, dtype)
        return
    crew = [_Worker(tokenizer, dtype) for _ in range(workers)]
    waiting: deque[tuple[Any, _Worker]] = deque()
    try:
        for number, (key, texts) in enumerate(batches):
            worker = crew[number % workers]
            if len(waiting) >= 2 * workers:  # two batches each: one at work, one ready
                done, other = waiting.popleft()
                yield done, other.result()
            worker.give(texts)
            waiting.append((key, worker))
        while waiting:
            done, other = waiting.popleft()
            yield done, other.result()
    finally:
        for worker in crew:
            worker.stop()


class _Worker:
    """One process and the thread that listens to it."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, env=environment,
                                        stdout=subprocess.PIPE)
        self.results: queue.Queue[Any] = queue.Queue()
        self.orders: queue.Queue[Any] = queue.Queue()
        for work in (self._send, self._listen):
            threading.Thread(target=work, daemon=True).start()
        self.give((tokenizer, dtype))

    def give(self, order: Any) -> None:
        self.orders.put(order)

    def result(self) -> Encoded:
        made = self.results.get()
        if isinstance(made, BaseException):
            raise made
        assert isinstance(made, list)
        return made

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.orders.put(None)

    def _send(self) -> None:
        assert self.process.stdin
        try:
            while (order := self.orders.get()) is not None:
                pickle.dump(order, self.process.stdin, protocol=5)
                self.process.stdin.flush()
        except OSError:  # it is gone, which the listener tells
            pass

    def _listen(self) -> None:
        assert self.process.stdout
        try:
            while True:
                self.results.put(pickle.load(self.process.stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            self.results.put(DataError(f"a process that tokenised ended with code {self.process.wait()}; run the same "
                                       "command again, it goes on at the last shard"))


def serve() -> None:
    """A worker's whole life."""
    orders, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else gets between the results
    try:
        tokenizer, dtype = pickle.load(orders)
        while True:
            made = encode(tokenizer, pickle.load(orders), dtype)
            pickle.dump(made, results, protocol=5)
            results.flush()
    except (EOFError, OSError, KeyboardInterrupt):
        return
