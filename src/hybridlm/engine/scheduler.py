"""The scheduler: many outputs at once over one engine, on any device.

One thread makes rounds. Each round is a pass that reads the last token of every running output (decode rows) and some
rows of prompts that are still being read (prefill rows), so the weights are read once for all, and a long prompt
delays the others by no more than one slice of it. What an output consists of does not depend on what else runs: rows
are computed one by one, and `Writer.slice` cuts prompts by their own length alone.

Which prompt goes first is decided by fair sojourn (Friedman and Henderson, 2003): the scheduler simulates machines
that share their time equally among all prompts, and serves the prompt that would be finished first there. So each has
its first token no later than under equal sharing (but for one slice and for estimates), and most have it much earlier;
no prompt can be overtaken for ever, because the sharing that is simulated goes on.

The prefix cache is asked when a prompt is begun, not when it comes in; and a prompt whose beginning is being read by
another one waits for that. So of several with one beginning the first reads it, the others find it.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridlm.engine.passes import SLAB
from hybridlm.engine.writer import Piece, Writer
from hybridlm.errors import HybridLMError

if TYPE_CHECKING:
    from hybridlm.engine.engine import Engine

__all__ = ["Closed", "Counters", "FairClock", "QueueFull", "Scheduler", "Stream", "TimedOut"]

ROUND_SECONDS = 0.25  # what prompts may add to a round, as far as whole slices allow
GPU_ROWS = 2048  # of prompts in a pass on a GPU: enough for its products, some 50 ms of the 7B
SLOW = 1_000_000_000  # parameters from which a CPU reads prompts in slices of 64


class QueueFull(HybridLMError):
    """No place left to wait in; `retry_after` is a guess in seconds."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"queue: {waiting} requests are waiting already; try again in about {retry_after} s")
        self.retry_after = retry_after


class TimedOut(HybridLMError):
    """A request's time was over before its first token."""


class Closed(HybridLMError):
    """The scheduler is shutting down."""


@dataclass(slots=True)
class Counters:
    """Since the start. Written by the scheduler's thread, read by anybody."""

    requests: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    timed_out: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    rounds: int = 0
    rows: int = 0
    pass_seconds: float = 0.0


class Stream:
    """One request. Iterate over it for its pieces, `for` in a thread or `async for` in an event loop, by one reader.

    An iteration raises what ended the request, if that was an error.
    """

    def __init__(self, scheduler: Scheduler, writer: Writer, seconds: float | None) -> None:
        self.writer = writer
        self.submitted = time.monotonic()
        self.begun: float | None = None  # when its prompt began to be read, as are the other two on the same clock
        self.first: float | None = None  # when its first token was there
        self.ended: float | None = None
        self._deadline = math.inf if seconds is None else self.submitted + seconds
        self._scheduler = scheduler
        self._ids = np.array(writer.prompt, dtype=np.int32)
        self._cancelled = False
        self._work = 0  # prompt rows, as estimated when it came in
        self._tag = 0.0  # when equal sharing would have read them, on the simulated clock
        self._token = -1  # chosen, to be read in the next round
        self._bytes = 0  # of memory set aside for its state
        self._ready: deque[Piece | BaseException] = deque()
        self._wake: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Stop as soon as possible; what was read so far goes into the prefix cache."""
        self._cancelled = True
        self._scheduler._nudge()

    def __iter__(self) -> Iterator[Piece]:
        arrived = threading.Event()
        while (item := self._take(arrived.set)) is None or self._is_more(item):
            if item is None:
                arrived.wait()
                arrived.clear()
            else:
                yield item  # type: ignore[misc]
        if isinstance(item, Piece):
            yield item

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
                loop.call_soon_threadsafe(arrived.set)

        while (item := self._take(wake)) is None or self._is_more(item):
            if item is None:
                await arrived.wait()
                arrived.clear()
            else:
                yield item  # type: ignore[misc]
        if isinstance(item, Piece):
            yield item

    def _is_more(self, item: Piece | BaseException) -> bool:
        """Whether something follows this item; raises it where it is an error."""
        if isinstance(item, BaseException):
            raise item
        return item.finish is None

    def _take(self, wake: Callable[[], None]) -> Piece | BaseException | None:
        """What has arrived; None, and `wake` will be called, where nothing has."""
        with self._lock:
            if self._ready:
                return self._ready.popleft()
            self._wake = wake
            return None

    def _put(self, item: Piece | BaseException) -> None:
        with self._lock:
            self._ready.append(item)
            wake, self._wake = self._wake, None
        if wake:
            wake()


class FairClock:
    """Equal sharing of a machine among jobs of known size, simulated: its clock runs at the rate each of them gets."""

    def __init__(self) -> None:
        self.now = 0.0
        self._tags: list[float] = []  # a heap of when each job would be done

    def arrive(self, work: float) -> float:
        """When, on this clock, a job that comes now would be done."""
        heapq.heappush(self._tags, self.now + work)
        return self.now + work

    def leave(self, tag: float) -> None:
        """A job goes away before its time."""
        if tag in self._tags:
            self._tags.remove(tag)
            heapq.heapify(self._tags)

    def clear(self) -> None:
        """No job is left."""
        self._tags.clear()

    def advance(self, work: float) -> None:
        """The machine has done so much."""
        while self._tags:
            step = self._tags[0] - self.now
            if work < step * len(self._tags):
                self.now += work / len(self._tags)
                return
            work -= step * len(self._tags)
            self.now = heapq.heappop(self._tags)


class Scheduler:
    """Serves one engine. Methods may be called from any thread."""

    def __init__(self, engine: Engine, *, running: int = 256, waiting: int = 512, state_bytes: int | None = None,
                 rows: int | None = None, step: int | None = None, round_seconds: float = ROUND_SECONDS) -> None:
        """
        Args:
            running: the most requests that are read or written at the same time.
            waiting: the most that wait for that; `submit` refuses further ones.
            state_bytes: memory for the states of running requests; None is a quarter of the machine's, or half of
                what the model leaves of a GPU's.
            rows: the most prompt rows of one pass; None is `SLAB`, on a GPU `GPU_ROWS`.
            step: rows of a prompt that are read at a time; None is all of a pass, of large models on a CPU less.
            round_seconds: time that prompts may add to a round while others write.
        """
        self.engine = engine
        self.counters = Counters()
        rows = rows or (SLAB if engine.device == "cpu" else min(engine.rows, GPU_ROWS))
        self.running, self.waiting, self.rows, self.round_seconds = running, waiting, rows, round_seconds
        slow = engine.device == "cpu" and engine.config.num_parameters() >= SLOW
        self.step = step or (min(64, rows) if slow else rows)
        self.state_bytes = engine.memory // (4 if engine.device == "cpu" else 2) if state_bytes is None else state_bytes
        self._unread: list[tuple[float, int, Stream]] = []  # prompts not read to the end, in order of service
        self._writing: list[Stream] = []
        self._clock = FairClock()
        self._serial = itertools.count()
        self._rate = 0.0  # rows a second of passes that read prompts, lately
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="hybridlm-scheduler", daemon=True)
        self._thread.start()

    # -- from outside --------------------------------------------------------------------------------------------

    def submit(self, writer: Writer, *, seconds: float | None = None) -> Stream:
        """Queue an output. Raises `QueueFull` past the bound, `Closed` after `close`.

        `seconds`: it ends with finish reason "time" after so many; with `TimedOut` if it has no token by then.
        """
        writer.step = self.step
        stream = Stream(self, writer, seconds)
        stream._work = max(1, writer.unread)
        stream._bytes = self._state_size(len(writer.prompt) + writer.most)
        with self._changed:
            if self._closing:
                raise Closed("shutting down; try another server")
            if self.queued >= self.waiting:
                self.counters.refused += 1
                raise QueueFull(self.queued, self.retry_after())
            self.counters.requests += 1
            stream._tag = self._clock.arrive(stream._work)
            bisect.insort(self._unread, (stream._tag, next(self._serial), stream))
            self._changed.notify()
        return stream

    @property
    def active(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._writing) + sum(stream.writer.begun for _, _, stream in list(self._unread))

    @property
    def queued(self) -> int:
        """Requests that wait to begin."""
        return sum(not stream.writer.begun for _, _, stream in list(self._unread))

    def retry_after(self) -> int:
        """Seconds in which the prompts that are waiting may be read, 1 to 60."""
        work = sum(stream._work for _, _, stream in list(self._unread))
        return min(60, max(1, math.ceil(work / self._rate))) if self._rate else 1

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing more, give what is there up to `seconds` to finish, fail the rest, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        end = time.monotonic() + seconds
        while self._thread.is_alive() and (self._unread or self._writing) and time.monotonic() < end:
            self._thread.join(0.02)
        with self._changed:
            for stream in [*self._writing, *(stream for _, _, stream in self._unread)]:
                stream._deadline = -math.inf
            self._changed.notify()
        self._thread.join()

    def _nudge(self) -> None:
        with self._changed:
            self._changed.notify()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._unread:
                    self._clock.clear()  # nobody waits: nothing is owed
                while not (self._unread or self._writing):
                    if self._closing:
                        return
                    self._changed.wait()
            self._sweep()
            if not self._round():
                with self._changed:  # nothing may run before something changes; deadlines are seen to meanwhile
                    if self._unread:
                        self._changed.wait(0.05)

    def _sweep(self) -> None:
        """See to requests that were cancelled or whose time is over."""
        now = time.monotonic()
        with self._changed:
            over = [s for s in (*self._writing, *(s for _, _, s in self._unread)) if s._cancelled or s._deadline < now]
        for stream in over:
            if stream._cancelled:
                self.counters.cancelled += 1
                self._end(stream, stream.writer.cut("cancelled"))
            elif stream._deadline == -math.inf:
                self._end(stream, Closed("shutting down; the output is not complete"))
            elif stream.first is None:
                self.counters.timed_out += 1
                self._end(stream, TimedOut(f"time: {stream.ended or now - stream.submitted:.0f} s were not enough to "
                                           "come to the first token"))
            else:
                self.counters.timed_out += 1
                self._end(stream, stream.writer.cut("time"))

    def _round(self) -> bool:
        """One token for each that writes, and a part of what is to be read. False if there was nothing to do."""
        writing = list(self._writing)
        reading, ready = self._slices(self.rows if not writing else self._room())
        if not writing and not reading and not ready:
            return False
        parts = [(s.writer.session, [s._token]) for s in writing]
        slices = [(s.writer.session, tokens) for s, tokens in reading]
        prompt_rows = sum(len(tokens) for _, tokens in slices)
        began = time.perf_counter()
        try:
            if slices and len(parts) + prompt_rows > self.rows:  # cut nowhere else than `Writer.slice` did
                if parts:
                    self.engine.feed(parts)
                self.engine.feed(slices)
            elif slices:
                self.engine.feed(parts + slices)
            for stream, _ in reading:
                stream.writer.keep()
            done = [stream for stream, _ in reading if not stream.writer.unread] + ready
            if slices or ready or not parts:
                choosing = writing + done
                logits: Any = self.engine.next_logits([s.writer.session for s in choosing]) if choosing else []
            else:
                choosing, logits = writing, self.engine.step(parts)
        except Exception as error:
            self._fail([*writing, *(s for s, _ in reading), *ready], error)
            return True
        seconds = time.perf_counter() - began
        self.counters.rounds += 1
        self.counters.rows += len(parts) + prompt_rows
        self.counters.pass_seconds += seconds
        if prompt_rows:
            with self._changed:
                self._clock.advance(prompt_rows)
            rate = (len(parts) + prompt_rows) / seconds
            self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        if done:
            with self._changed:
                gone = set(map(id, done))
                self._unread = [entry for entry in self._unread if id(entry[2]) not in gone]
                self._writing += done
        for stream, row in zip(choosing, logits, strict=True):
            self._write(stream, row)
        return True

    def _room(self) -> int:
        """Prompt rows of the next round, while others write."""
        return int(min(self.rows, max(self.step, self._rate * self.round_seconds)))

    def _slices(self, room: int) -> tuple[list[tuple[Stream, list[int]]], list[Stream]]:
        """What to read next, at most `room` rows, by order of service; and which prompts the cache held whole."""
        reading: list[tuple[Stream, list[int]]] = []
        ready: list[Stream] = []
        full = False
        with self._changed:
            order = [stream for _, _, stream in self._unread]
            running = len(self._writing) + sum(stream.writer.begun for stream in order)
        for stream in order:
            if room <= 0:
                break
            if not stream.writer.begun:
                full = full or (running > 0 and (running >= self.running
                                                 or self._held_bytes + stream._bytes > self.state_bytes))
                # Nobody begins before who waits for memory, or large ones would wait for ever.
                if full or any(self._reads_for(other, stream) for other in order if other.writer.begun):
                    continue
                running += 1
                self._begin(stream)
            tokens = stream.writer.slice()
            if not tokens:
                ready.append(stream)
            elif len(tokens) <= room:
                reading.append((stream, tokens))
                room -= len(tokens)
        return reading, ready

    def _reads_for(self, other: Stream, stream: Stream) -> bool:
        """Whether `other`, which has begun, will soon leave a checkpoint that saves `stream` a slice or more."""
        if not self.engine.cache.budget or other._ids[0] != stream._ids[0]:
            return False
        n = min(len(other._ids), len(stream._ids))
        differs = np.flatnonzero(other._ids[:n] != stream._ids[:n])
        common = int(differs[0]) if len(differs) else n
        mark = common - common % self.engine.checkpoint_every
        return (mark > other.writer.session.position
                and mark - self.engine.cache.covered(stream.writer.prompt) >= self.step)

    def _begin(self, stream: Stream) -> None:
        stream.begun = time.monotonic()
        self._held_bytes += stream._bytes
        stream.writer.begin()
        # What the cache had come to hold since it came in counts as read at once. Otherwise the simulated machines
        # would fall ever further behind, and whoever waits for its turn there would wait for ever.
        with self._changed:
            self._clock.advance(max(0, stream._work - stream.writer.unread))
        self.counters.prompt_tokens += len(stream.writer.prompt)
        self.counters.reused_tokens += stream.writer.reused_tokens

    def _write(self, stream: Stream, logits: Any) -> None:
        """The next token of one output."""
        try:
            piece = stream.writer.nothing() or stream.writer.write(logits)
        except Exception as error:  # of this request alone: the others must not suffer from it
            self._fail([stream], error)
            return
        if stream.first is None:
            stream.first = time.monotonic()
        if piece.token is not None:
            self.counters.generated_tokens += 1
            stream._token = piece.token
        if piece.finish is None:
            stream._put(piece)
        else:
            self.counters.finished += 1
            self._end(stream, piece)

    def _fail(self, streams: list[Stream], error: Exception) -> None:
        for stream in streams:
            self.counters.failed += 1
            self._end(stream, error)

    def _end(self, stream: Stream, last: Piece | BaseException) -> None:
        """Take a request out, keep what it has read, tell who waits for it."""
        with self._changed:
            self._unread = [entry for entry in self._unread if entry[2] is not stream]
            if stream in self._writing:
                self._writing.remove(stream)
            if stream.first is None:
                self._clock.leave(stream._tag)
            if stream.writer.begun:
                self._held_bytes -= stream._bytes
        stream.ended = time.monotonic()
        try:
            if stream.writer.begun:
                stream.writer.end()
        except Exception as error:
            last = error
        stream._put(last)

    def _state_size(self, tokens: int) -> int:
        """Bytes of a state that has read so many tokens."""
        layout = self.engine.layout
        tokens = min(tokens, self.engine.context)
        return layout.own_bytes(tokens) + sum(layout.page_bytes(g) for g in layout.full_pages(tokens))
